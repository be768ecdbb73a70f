"use strict";
// The charts of a report: a Gantt chart with levels of detail, and the cores in use over time, on canvases.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const raw = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const chart = document.getElementById("gantt");
  if (!data.cores) return;
  const use = document.getElementById("use");
  const tip = document.getElementById("tip");
  const busy = raw(data.busy), failed = raw(data.failed);
  const bars = data.bars && {
    times: new Float64Array(raw(data.bars.times).buffer),
    what: new Uint32Array(raw(data.bars.what).buffer),
    ids: data.bars.ids,
  };
  const LEFT = 110, FEW = 20000;
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
  const barAt = (index) => ({ start: bars.times[2 * index], end: bars.times[2 * index] + bars.times[2 * index + 1],
    place: data.places[bars.what[3 * index]], name: data.names[bars.what[3 * index + 1]], status: data.words[bars.what[3 * index + 2]] });

  const drawGantt = () => {
    const [pen, width, full] = sized(chart), height = full - 24, across = (width - LEFT) / (to - from), down = height / (bottom - top);
    pen.save();
    pen.beginPath();
    pen.rect(LEFT, 0, width - LEFT, height);
    pen.clip();
    pen.fillStyle = css("--ground");
    pen.fillRect(LEFT, 0, width - LEFT, height);
    let seen = [];
    if (bars && down >= 1)
      for (let index = 0; index < bars.ids.length && seen.length <= FEW; index++) {
        const start = bars.times[2 * index];
        if (start <= to && start + bars.times[2 * index + 1] >= from) seen.push(index);
      }
    chart.dataset.detail = bars && down >= 1 && seen.length <= FEW ? "bars" : "density";
    if (chart.dataset.detail === "bars") {
      const colours = { finished: css("--good"), failed: css("--bad") }, gap = down > 4 ? 1 : 0, labels = [];
      for (const index of seen) {
        const bar = barAt(index), x = LEFT + (bar.start - from) * across, w = Math.max((bar.end - bar.start) * across, 1);
        pen.fillStyle = colours[bar.status] || css("--other");
        for (const [first, count] of bar.place) {
          if (first + count <= top || first >= bottom) continue;
          pen.fillRect(x, (first - top) * down + gap / 2, Math.max(w - (w > 3 ? 1 : 0), 1), count * down - gap);
          if (w > 50 && down >= 12) labels.push([bar.name || bars.ids[index], x, (first - top + count / 2) * down + 4, w]);
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
    for (let row = Math.ceil(top / step) * step; row < bottom; row += step) pen.fillText(nameOf(row).slice(-16), LEFT - 6, Math.max((row - top + 0.5) * down + 4, 10));
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
      for (let index = 0; index < bars.ids.length; index++) {
        const bar = barAt(index);
        if (bar.start <= time && bar.end >= time && bar.place.some(([first, count]) => first <= row && row < first + count))
          return `${core}: task ${bars.ids[index]} ${bar.name} ${bar.status}, ${+(bar.end - bar.start).toPrecision(4)} s`;
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
