// What a reader with weak eyes, or with a screen reader, would stumble over on a page: a list of sentences.
(() => {
  const problems = [], seen = new Set();
  const parse = (text) => { const found = text.match(/[\d.]+/g).map(Number); return [found[0], found[1], found[2], found[3] === undefined ? 1 : found[3]]; };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const light = (colour) => { const [r, g, b] = colour.map((part) => { const c = part / 255; return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const ratio = (one, other) => { const [a, b] = [light(one), light(other)].sort((x, y) => y - x); return (a + 0.05) / (b + 0.05); };
  const ground = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) layers.unshift(parse(getComputedStyle(at).backgroundColor));
    return layers.reduce((below, top) => over(top, below), [255, 255, 255, 1]);
  };
  const shown = (element) => element.checkVisibility() && !element.closest(".unseen, .skip, dialog:not([open])");
  const name = (element) => (element.getAttribute("aria-label") || element.textContent.trim() || element.title ||
    (element.labels && [...element.labels].map((label) => label.textContent).join(" ").trim()) || "");
  for (const element of document.querySelectorAll("body *")) {
    if (!shown(element)) continue;
    const what = element.tagName.toLowerCase() + (element.id ? "#" + element.id : "") + "." + element.className;
    if ([...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim())) {
      const style = getComputedStyle(element), below = ground(element), found = ratio(over(parse(style.color), below), below);
      if (found < 4.5) problems.push(what + " has a contrast of " + found.toFixed(1) + ": " + element.textContent.slice(0, 40));
    }
    if (/^(A|BUTTON|INPUT|SELECT|TEXTAREA|CANVAS|SUMMARY)$/.test(element.tagName) || element.getAttribute("role") === "img")
      if (!name(element)) problems.push(what + " has no name");
    if (element.tagName === "TH" && !element.getAttribute("scope")) problems.push(what + " has no scope");
    if (element.tagName === "TABLE" && !element.caption) problems.push(what + " has no caption");
    if (element.id && seen.has(element.id)) problems.push("two elements are called " + element.id);
    seen.add(element.id);
  }
  if (!document.documentElement.lang) problems.push("the page does not say its language");
  if (!document.title) problems.push("the page has no title");
  if (document.querySelectorAll("main").length !== 1) problems.push("there is not one main part");
  if (document.documentElement.scrollWidth > document.documentElement.clientWidth) problems.push("the page is wider than its window");
  return problems;
})()
