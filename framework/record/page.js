"use strict";
// Draws the charts anew at their real width, with a logarithmic scale on demand and values under the pointer. Without
// this script the page shows the same curves, drawn when it was written.
(() => {
  const charts = JSON.parse(document.getElementById("data").textContent);
  const LEFT = 58, RIGHT = 10, TOP = 10, BOTTOM = 24;
  const SVG = "http://www.w3.org/2000/svg";

  const make = (name, attributes, text) => {
    const made = document.createElementNS(SVG, name);
    for (const key in attributes) made.setAttribute(key, attributes[key]);
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const short = (value) => {
    const size = Math.abs(value);
    if (Number.isInteger(value) && size < 1e7) return value.toLocaleString("en");
    if (size >= 1e7 || size < 1e-3) return value.toExponential(2).replace("e+", "e");
    return size >= 1000 ? Number(value.toPrecision(4)).toLocaleString("en") : String(Number(value.toPrecision(4)));
  };
  const inBytes = (value) => {
    for (const [power, unit] of [[40, "TiB"], [30, "GiB"], [20, "MiB"], [10, "KiB"]]) {
      if (Math.abs(value) >= 2 ** power) return Number((value / 2 ** power).toPrecision(3)) + " " + unit;
    }
    return value + " B";
  };
  const written = (value, unit) => unit === "bytes" ? inBytes(value) : short(value);
  const limits = (values) => {
    let low = Infinity, high = -Infinity;
    for (const value of values) { if (value < low) low = value; if (value > high) high = value; }
    if (low > high) return [0, 1];
    if (high - low > 1e-12 * Math.max(Math.abs(low), Math.abs(high))) return [low, high];
    const room = Math.abs(high) * 0.05 || 1;
    return [low - room, high + room];
  };
  const ticks = (low, high, most) => {
    const span = high - low;
    let step = 10 ** Math.floor(Math.log10(span / most));
    step *= [1, 2, 5, 10, 20].find((factor) => span / (step * factor) <= most) || 20;
    const found = [];
    for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9 && found.length < 50; at++) {
      found.push(Number((at * step).toPrecision(12)));
    }
    return found;
  };
  const logTicks = (low, high) => {
    const found = [];
    const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high)), few = last - first <= 3;
    for (let power = first; power <= last; power++) {
      for (const factor of few ? [1, 2, 5] : [1]) {
        const tick = Number((factor * 10 ** power).toPrecision(3));
        if (tick >= low * 0.999 && tick <= high * 1.001) found.push(tick);
      }
    }
    return found.length > 1 ? found : ticks(low, high, 5);
  };

  document.querySelectorAll("figure[data-chart]").forEach((figure) => {
    const chart = charts[Number(figure.dataset.chart)];
    const svg = figure.querySelector("svg");
    const values = chart.lines.flatMap((line) => line.y.filter((value) => value !== null));
    const canLog = values.some((value) => value > 0) && chart.unit !== "bytes";
    let isLog = false, scale = null;

    const draw = () => {
      const width = Math.max(260, figure.clientWidth - 26);
      const height = figure.classList.contains("wide") ? Math.min(340, Math.max(220, width * 0.34)) : Math.min(240, width * 0.5);
      const shown = isLog ? values.filter((value) => value > 0) : values;
      const [left, right] = limits(chart.lines.flatMap((line) => line.x));
      const f = isLog ? Math.log : (value) => value;
      const back = isLog ? Math.exp : (value) => value;
      let [from, high] = limits(shown);
      if (isLog && from <= 0) from = high / 10;
      const room = 0.04 * (f(high) - f(from));
      [from, high] = [back(f(from) - room), back(f(high) + room)];
      const x = (step) => LEFT + (width - LEFT - RIGHT) * (step - left) / (right - left);
      const y = (value) => height - BOTTOM - (height - BOTTOM - TOP) * (f(value) - f(from)) / (f(high) - f(from));
      svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      svg.style.height = height + "px";
      svg.replaceChildren();
      for (const tick of isLog ? logTicks(from, high) : ticks(from, high, 5)) {
        svg.append(make("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(tick), y2: y(tick) }));
        svg.append(make("text", { x: LEFT - 6, y: y(tick) + 4, "text-anchor": "end" }, written(tick, chart.unit)));
      }
      for (const tick of ticks(left, right, Math.max(2, Math.floor(width / 70)))) {
        svg.append(make("text", { x: x(tick), y: height - 6, "text-anchor": "middle" }, short(tick)));
      }
      for (const mark of chart.marks) {
        if (mark < left || mark > right) continue;
        const line = make("line", { class: "mark", x1: x(mark), x2: x(mark), y1: TOP, y2: height - BOTTOM });
        line.append(make("title", {}, "resumed at update " + short(mark)));
        svg.append(line);
      }
      for (const line of chart.lines) {
        let piece = [];
        const end = () => {
          if (piece.length > 1) svg.append(make("polyline", { class: line.style, points: piece.join(" ") }));
          else if (piece.length === 1 && !line.dots) dot(piece[0], 2);
          piece = [];
        };
        const dot = (place, r) => {
          const [cx, cy] = place.split(",");
          svg.append(make("circle", { class: line.style, cx, cy, r }));
        };
        line.x.forEach((step, place) => {
          const value = line.y[place];
          if (value === null || (isLog && value <= 0)) return end();
          const at = x(step).toFixed(1) + "," + y(value).toFixed(1);
          piece.push(at);
          if (line.dots) dot(at, 2.5);
        });
        end();
      }
      scale = { x, y, left, right, width, height };
    };

    if (canLog) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = "log scale";
      button.setAttribute("aria-pressed", String(isLog));
      button.addEventListener("click", () => {
        isLog = !isLog;
        button.setAttribute("aria-pressed", String(isLog));
        draw();
      });
      figure.querySelector("figcaption").append(button);
    }

    const tip = document.createElement("div");
    tip.className = "tip";
    tip.hidden = true;
    figure.append(tip);
    const hide = () => { tip.hidden = true; svg.querySelectorAll(".cursor").forEach((each) => each.remove()); };
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const at = (event.clientX - box.left) * scale.width / box.width;
      const step = scale.left + (at - LEFT) * (scale.right - scale.left) / (scale.width - LEFT - RIGHT);
      if (step < scale.left || step > scale.right) return hide();
      hide();
      const rows = [];
      let nearest = null;
      const found = chart.lines.map((line) => {
        let low = 0, high = line.x.length - 1;
        while (low < high) {
          const middle = (low + high) >> 1;
          if (line.x[middle] < step) low = middle + 1; else high = middle;
        }
        if (low > 0 && Math.abs(line.x[low - 1] - step) < Math.abs(line.x[low] - step)) low--;
        if (nearest === null || Math.abs(line.x[low] - step) < Math.abs(nearest - step)) nearest = line.x[low];
        return low;
      });
      const reach = (scale.right - scale.left) * 0.04;
      chart.lines.forEach((line, number) => {
        const place = found[number];
        if (Math.abs(line.x[place] - step) > reach && line.x[place] !== nearest) return;
        const row = document.createElement("div");
        row.className = "key " + line.style;
        const value = line.y[place];
        row.append(line.name + " ");
        const number_ = document.createElement("b");
        number_.textContent = value === null ? "not finite" : written(value, chart.unit);
        row.append(number_);
        if (line.x[place] !== nearest) row.append(" at " + short(line.x[place]));
        rows.push(row);
      });
      const head = document.createElement("div");
      head.textContent = "update " + short(nearest);
      tip.replaceChildren(head, ...rows);
      tip.hidden = false;
      const place = scale.x(nearest);
      svg.append(make("line", { class: "cursor", x1: place, x2: place, y1: TOP, y2: scale.height - BOTTOM }));
      const inFigure = place * box.width / scale.width + box.left - figure.getBoundingClientRect().left;
      const isRight = inFigure > figure.clientWidth / 2;
      tip.style.left = isRight ? "" : inFigure + 12 + "px";
      tip.style.right = isRight ? figure.clientWidth - inFigure + 12 + "px" : "";
      tip.style.top = "44px";
    });
    draw();
    if (window.ResizeObserver) {
      let before = figure.clientWidth;
      new ResizeObserver(() => { if (figure.clientWidth !== before) { before = figure.clientWidth; draw(); } }).observe(figure);
    }
    figure.closest("details")?.addEventListener("toggle", draw);
  });

  const theme = document.getElementById("theme");
  const isDark = () => (document.documentElement.dataset.theme
    || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  theme.hidden = false;
  theme.addEventListener("click", () => { document.documentElement.dataset.theme = isDark() ? "light" : "dark"; });

  // A run that was killed can't say so: a page that hasn't been written for long does.
  const ago = (seconds) => seconds < 90 ? Math.round(seconds) + " s" : seconds < 5400 ? Math.round(seconds / 60) + " min"
    : seconds < 129600 ? Math.round(seconds / 3600) + " h" : Math.round(seconds / 86400) + " days";
  document.querySelectorAll("time.since").forEach((each) => {
    const seconds = (Date.now() - Date.parse(each.dateTime)) / 1000;
    if (seconds >= 0) each.textContent += ` (${ago(seconds)} ago)`;
  });
  document.querySelectorAll(".badge.running[data-seen]").forEach((badge) => {
    const seconds = (Date.now() - Date.parse(badge.dataset.seen)) / 1000;
    if (seconds > Number(badge.dataset.patience)) {
      badge.className = "badge silent";
      badge.textContent = "no sign of life for " + ago(seconds);
    }
  });
})();
