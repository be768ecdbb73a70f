"use strict";
// The charts of a report: a Gantt chart with levels of detail, and the cores in use over time, on canvases.
(async () => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const chart = document.getElementById("gantt");
  if (!data.cores) return;
  const use = document.getElementById("use");
  const tip = document.getElementById("tip");
  if (!window.DecompressionStream) {
    tip.textContent = "This browser is too old for the charts: it has no DecompressionStream.";
    return;
  }
  const unpack = async (text) => {
    const packed = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    return new Uint8Array(await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"))).arrayBuffer());
  };
  const words = async (text) => JSON.parse(new TextDecoder().decode(await unpack(text)));
  const numbers = async (text) => {
    const bytes = await unpack(text), count = (bytes.length - 1) / bytes[0], found = new Float64Array(count);
    for (let part = 0, at = 1, weight = 1; part < bytes[0]; part++, weight *= 256)
      for (let index = 0; index < count; index++) found[index] += bytes[at++] * weight;
    return found;
  };
  const signed = (number) => (number % 2 ? -(number + 1) / 2 : number / 2);
  const sums = (differences) => {
    let sum = 0;
    return differences.map((each) => (sum += signed(each)));
  };
  const busy = await unpack(data.busy), failed = await unpack(data.failed);
  const LEFT = 110, FEW = 20000, UNPACK = 100000;

  // The executions one by one, unpacked when they may first be few enough to be drawn.
  let bars = null, asked = false;
  const unpackBars = async () => {
    const packed = data.bars, count = packed.count, start = new Float64Array(count), end = new Float64Array(count);
    const place = new Uint32Array(count), runs = await numbers(packed.runs), spans = await numbers(packed.spans);
    const gaps = await numbers(packed.gaps), lengths = await numbers(packed.lengths);
    for (let index = 0, at = 0; index < count; index++) {
      start[index] = (at += signed(gaps[index])) * packed.unit;
      end[index] = (at += lengths[index]) * packed.unit;
    }
    const first = sums(await numbers(packed.first)), rows = await numbers(packed.rows);
    const span = new Uint32Array(spans.length + 1);
    for (let index = 0, run = 0; index < spans.length; index++) {
      span[index + 1] = span[index] + spans[index];
      place.fill(index, run, (run += runs[index]));
    }
    bars = { count, start, end, place, span, first, rows, status: await numbers(packed.status) };
    if (packed.names) [bars.names, bars.name] = [await words(packed.names), await numbers(packed.name)];
    if (packed.heads) [bars.heads, bars.head, bars.number] = [await words(packed.heads), await numbers(packed.head), sums(await numbers(packed.number))];
  };
  const idOf = (index) => (bars.heads ? bars.heads[bars.head[index]] + (bars.number[index] ? bars.number[index] - 1 : "") : "");
  const named = (index) => (bars.names ? bars.names[bars.name[index]] : "");
  const within = (index, low, high) => {
    for (let at = bars.span[bars.place[index]]; at < bars.span[bars.place[index] + 1]; at++)
      if (bars.first[at] < high && bars.first[at] + bars.rows[at] > low) return true;
    return false;
  };
  let from = 0, to = data.seconds, top = 0, bottom = data.cores;
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const rgb = (name) => {
    const canvas = document.createElement("canvas"), pen = canvas.getContext("2d");
    pen.fillStyle = css(name);
    pen.fillRect(0, 0, 1, 1);
    return pen.getImageData(0, 0, 1, 1).data;
  };

  // All of the density as one picture, of which a part is drawn.
  const picture = () => {
    const canvas = document.createElement("canvas");
    canvas.width = data.columns;
    canvas.height = data.rows;
    const pen = canvas.getContext("2d"), image = pen.createImageData(data.columns, data.rows);
    const good = rgb("--good"), bad = rgb("--bad"), ground = rgb("--ground");
    for (let cell = 0; cell < busy.length; cell++) {
      const share = busy[cell] ? 0.12 + (0.88 * busy[cell]) / 255 : 0;
      const wrong = busy[cell] ? Math.min(1, failed[cell] / busy[cell]) : 0;
      for (let part = 0; part < 3; part++) {
        const colour = good[part] * (1 - wrong) + bad[part] * wrong;
        image.data[4 * cell + part] = ground[part] * (1 - share) + colour * share;
      }
      image.data[4 * cell + 3] = 255;
    }
    pen.putImageData(image, 0, 0);
    return canvas;
  };
  let density = picture();

  const sized = (canvas) => {
    const scale = window.devicePixelRatio || 1, box = canvas.getBoundingClientRect();
    canvas.width = Math.round(box.width * scale);
    canvas.height = Math.round(box.height * scale);
    const pen = canvas.getContext("2d");
    pen.scale(scale, scale);
    pen.font = "12px system-ui, sans-serif";
    pen.clearRect(0, 0, box.width, box.height);
    return [pen, box.width, box.height];
  };
  const length = (seconds, step) => {
    if (step < 1) return `${+(seconds).toPrecision(8)} s`;
    const whole = Math.round(seconds), two = (n) => String(n).padStart(2, "0");
    return `${Math.floor(whole / 3600)}:${two(Math.floor(whole / 60) % 60)}:${two(whole % 60)}`;
  };
  const axis = (pen, width, height) => {
    const rough = (to - from) / Math.max(2, (width - LEFT) / 110), ten = 10 ** Math.floor(Math.log10(rough));
    const step = rough < 1 ? [1, 2, 5, 10].map((n) => n * ten).find((n) => n >= rough)
      : [1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400, 43200, 86400, 604800].find((n) => n >= rough) || ten * 10;
    pen.fillStyle = css("--text");
    pen.textAlign = "center";
    for (let at = Math.ceil(from / step) * step; at <= to; at += step) {
      const x = LEFT + ((at - from) / (to - from)) * (width - LEFT);
      pen.fillRect(x, height - 22, 1, 5);
      if (x < width - 25) pen.fillText(length(at, step), x, height - 5);
    }
  };
  const drawGantt = () => {
    const [pen, width, full] = sized(chart), height = full - 24, across = (width - LEFT) / (to - from), down = height / (bottom - top);
    pen.save();
    pen.beginPath();
    pen.rect(LEFT, 0, width - LEFT, height);
    pen.clip();
    pen.fillStyle = css("--ground");
    pen.fillRect(LEFT, 0, width - LEFT, height);
    const thick = data.bars.count && down >= 1, seen = [];
    if (thick && !asked && (data.bars.count * (to - from) * (bottom - top)) / data.seconds / data.cores <= UNPACK) {
      asked = true;
      unpackBars().then(draw);
    }
    if (thick && bars)
      for (let index = 0; index < bars.count && seen.length <= FEW; index++)
        if (bars.start[index] <= to && bars.end[index] >= from && within(index, top, bottom)) seen.push(index);
    chart.dataset.detail = thick && bars && seen.length <= FEW ? "bars" : "density";
    if (chart.dataset.detail === "bars") {
      const colours = { finished: css("--good"), failed: css("--bad") }, other = css("--other"), gap = down > 4 ? 1 : 0, labels = [];
      for (const index of seen) {
        const x = LEFT + (bars.start[index] - from) * across, w = Math.max((bars.end[index] - bars.start[index]) * across, 1);
        pen.fillStyle = colours[data.words[bars.status[index]]] || other;
        for (let at = bars.span[bars.place[index]]; at < bars.span[bars.place[index] + 1]; at++) {
          const first = bars.first[at], rows = bars.rows[at];
          if (first + rows <= top || first >= bottom) continue;
          pen.fillRect(x, (first - top) * down + gap / 2, Math.max(w - (w > 3 ? 1 : 0), 1), rows * down - gap);
          if (w > 50 && down >= 12) labels.push([named(index) || idOf(index), x, ((Math.max(first, top) + Math.min(first + rows, bottom)) / 2 - top) * down + 4, w]);
        }
      }
      pen.fillStyle = css("--onbar");
      for (const [text, x, y, w] of labels) {
        const begin = Math.max(x, LEFT) + 4, room = Math.floor((x + w - begin - 4) / 7);
        if (room > 2) pen.fillText(text.length > room ? `${text.slice(0, room - 1)}…` : text, begin, y);
      }
    } else {
      pen.imageSmoothingEnabled = to - from > data.seconds / 8;
      pen.drawImage(density, (from / data.seconds) * data.columns, (top / data.cores) * data.rows, ((to - from) / data.seconds) * data.columns,
        ((bottom - top) / data.cores) * data.rows, LEFT, 0, width - LEFT, height);
    }
    pen.restore();
    pen.fillStyle = css("--text");
    pen.textAlign = "right";
    const step = Math.max(1, Math.ceil(16 / down));
    for (let row = Math.floor(top / step) * step; row < bottom; row += step) {
      const low = Math.max(row, top), high = Math.min(row + 1, bottom);
      if (high - low >= Math.min(0.5, 12 / down)) pen.fillText(nameOf(row).slice(-16), LEFT - 6, Math.max(((low + high) / 2 - top) * down + 4, 10));
    }
    axis(pen, width, full);
  };
  const nameOf = (row) => {
    let at = 0;
    while (at + 1 < data.nodes.length && data.nodes[at + 1][1] <= row) at++;
    const [node, first, cores] = data.nodes[at];
    return `${node}:${cores[row - first]}`;
  };
  const drawUse = () => {
    const [pen, width, full] = sized(use), height = full - 30, columns = data.use.length;
    pen.fillStyle = css("--good");
    for (let x = LEFT; x < width; x++) {
      const share = (pixel) => ((from + ((pixel - LEFT) / (width - LEFT)) * (to - from)) / data.seconds) * columns;
      const first = Math.min(Math.floor(share(x)), columns - 1), last = Math.min(Math.max(Math.ceil(share(x + 1)), first + 1), columns);
      let sum = 0;
      for (let cell = first; cell < last; cell++) sum += data.use[cell];
      const high = (sum / (last - first)) * (height - 8);
      pen.fillRect(x, height - high, 1, high);
    }
    pen.fillStyle = css("--text");
    pen.textAlign = "right";
    pen.fillText(data.cores.toLocaleString("en"), LEFT - 6, 14);
    pen.fillText("0", LEFT - 6, height);
    pen.fillRect(LEFT, 8, width - LEFT, 1);
    axis(pen, width, full);
  };
  let due = false;
  const draw = () => {
    if (due) return;
    due = true;
    requestAnimationFrame(() => { due = false; drawGantt(); drawUse(); });
  };
  const keep = (low, high, most, least) => {
    const size = Math.min(Math.max(high - low, least), most), begin = Math.min(Math.max(low, 0), most - size);
    return [begin, begin + size];
  };
  const move = (a, b, c, d) => {
    [from, to] = keep(a, b, data.seconds, data.seconds / 1e6);
    [top, bottom] = keep(c, d, data.cores, Math.min(data.cores, 1));
    draw();
  };
  const zoom = (factor, x, y, rows) => {
    const t = from + x * (to - from), r = top + y * (bottom - top), f = rows ? factor : 1;
    move(t - (t - from) * factor, t + (to - t) * factor, r - (r - top) * f, r + (bottom - r) * f);
  };
  const where = (event) => {
    const box = chart.getBoundingClientRect();
    return [(event.clientX - box.left - LEFT) / (box.width - LEFT), (event.clientY - box.top) / (box.height - 24)];
  };
  chart.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(Math.exp(event.deltaY / 400), ...where(event), !event.shiftKey);
  }, { passive: false });
  let held = null;
  chart.addEventListener("pointerdown", (event) => { held = [where(event), from, to, top, bottom]; chart.setPointerCapture(event.pointerId); });
  chart.addEventListener("pointerup", () => { held = null; });
  chart.addEventListener("pointercancel", () => { held = null; });
  chart.addEventListener("pointermove", (event) => {
    const [x, y] = where(event);
    if (held) {
      const dx = (held[0][0] - x) * (held[2] - held[1]), dy = (held[0][1] - y) * (held[4] - held[3]);
      return move(held[1] + dx, held[2] + dx, held[3] + dy, held[4] + dy);
    }
    tip.textContent = x < 0 || y < 0 || y >= 1 ? "" : textAt(from + x * (to - from), top + y * (bottom - top));
  });
  const textAt = (time, row) => {
    const core = nameOf(Math.min(Math.floor(row), data.cores - 1));
    if (chart.dataset.detail === "bars")
      for (let index = 0; index < bars.count; index++)
        if (bars.start[index] <= time && bars.end[index] >= time && within(index, row, row + 1e-9)) {
          const what = ["task", idOf(index), named(index), data.words[bars.status[index]]].filter((word) => word).join(" ");
          return `${core}: ${what}, ${+(bars.end[index] - bars.start[index]).toPrecision(4)} s`;
        }
    const cell = Math.min(Math.floor((row / data.cores) * data.rows), data.rows - 1) * data.columns +
      Math.min(Math.floor((time / data.seconds) * data.columns), data.columns - 1);
    return `${core}, ${length(time, 1)}: in use ${Math.round(busy[cell] / 2.55)} %, by what did not finish ${Math.round(failed[cell] / 2.55)} %`;
  };
  chart.addEventListener("keydown", (event) => {
    const across = (to - from) / 5, down = (bottom - top) / 5;
    if (event.key === "ArrowLeft") move(from - across, to - across, top, bottom);
    else if (event.key === "ArrowRight") move(from + across, to + across, top, bottom);
    else if (event.key === "ArrowUp") move(from, to, top - down, bottom - down);
    else if (event.key === "ArrowDown") move(from, to, top + down, bottom + down);
    else if (event.key === "+") zoom(0.7, 0.5, 0.5, true);
    else if (event.key === "-") zoom(1 / 0.7, 0.5, 0.5, true);
    else if (event.key === "0") move(0, data.seconds, 0, data.cores);
    else return;
    event.preventDefault();
  });
  document.getElementById("all").addEventListener("click", () => move(0, data.seconds, 0, data.cores));
  document.getElementById("in").addEventListener("click", () => zoom(0.5, 0.5, 0.5, true));
  document.getElementById("out").addEventListener("click", () => zoom(2, 0.5, 0.5, true));
  window.addEventListener("resize", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { density = picture(); draw(); });
  drawGantt();
  drawUse();
})();
