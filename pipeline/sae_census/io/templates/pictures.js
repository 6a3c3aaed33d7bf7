// Pictures: all SVG, so that they follow the colours of the page and print.

/** Frequency against mean code of all features that fire, as binned density with margins; drag to choose a region. */
function cloud(number, columns, changed) {
  const W = 440, H = 300, left = 44, right = 34, top = 26, bottom = 40, NX = 58, NY = 38;
  const alive = columns.id.filter((id) => columns.count[id]);
  const extent = (values, log) => {
    let low = Infinity, high = -Infinity;
    for (const id of alive) { const v = log(values[id]); if (v < low) low = v; if (v > high) high = v; }
    return low < high ? [low, high] : low === high ? [low - 0.5, high + 0.5] : [0, 1];
  };
  const [x0, x1] = extent(columns.frequency, Math.log10), [y0, y1] = extent(columns.mean_when_firing, Math.log2);
  const wide = W - left - right, tall = H - top - bottom;
  const X = (v) => left + (wide * (Math.log10(v) - x0)) / (x1 - x0), Y = (v) => top + tall - (tall * (Math.log2(v) - y0)) / (y1 - y0);
  const counts = new Int32Array(NX * NY), overX = new Int32Array(NX), overY = new Int32Array(NY);
  for (const id of alive) {
    const i = Math.min(NX - 1, Math.floor((NX * (X(columns.frequency[id]) - left)) / wide));
    const j = Math.min(NY - 1, Math.floor((NY * (Y(columns.mean_when_firing[id]) - top)) / tall));
    counts[j * NX + i]++; overX[i]++; overY[j]++;
  }
  const most = Math.log1p(Math.max(1, ...counts)), cw = wide / NX, ch = tall / NY;
  const cells = [];
  counts.forEach((n, c) => {
    if (n) cells.push(svg("rect", { x: left + (c % NX) * cw, y: top + Math.floor(c / NX) * ch, width: cw - 0.4, height: ch - 0.4, "fill-opacity": (0.15 + (0.85 * Math.log1p(n)) / most).toFixed(2) }));
  });
  const peakX = Math.max(1, ...overX), peakY = Math.max(1, ...overY);
  const margins = [...overX].map((n, i) => svg("rect", { x: left + i * cw, width: cw - 0.4, y: top - 3 - (18 * n) / peakX, height: (18 * n) / peakX }))
    .concat([...overY].map((n, j) => svg("rect", { y: top + j * ch, height: ch - 0.4, x: W - right + 3, width: (26 * n) / peakY })));
  const ticks = [];
  for (let e = Math.ceil(x0); e <= x1; e++) {
    ticks.push(svg("line", { x1: X(10 ** e), x2: X(10 ** e), y1: top, y2: H - bottom + 4 }), svg("text", { x: X(10 ** e), y: H - bottom + 15, "text-anchor": "middle" }, `${Number((10 ** (e + 2)).toPrecision(1))} %`));
  }
  for (let e = Math.ceil(y0), step = Math.max(1, Math.round((y1 - y0) / 7)); e <= y1; e += step) {
    ticks.push(svg("line", { x1: left - 4, x2: W - right, y1: Y(2 ** e), y2: Y(2 ** e) }), svg("text", { x: left - 7, y: Y(2 ** e) + 3.5, "text-anchor": "end" }, String(2 ** e)));
  }
  const region = svg("rect", { class: "region", width: 0, height: 0 }), dot = svg("circle", { class: "dot", r: 5, visibility: "hidden" });
  const picture = svg("svg", { viewBox: `0 0 ${W} ${H}`, class: "cloud", role: "img", "aria-label": `Frequency and mean code of ${alive.length} features that fire` },
    svg("g", { class: "ticks" }, ticks), svg("g", { class: "cells" }, cells), svg("g", { class: "margins" }, margins),
    svg("text", { x: left + wide / 2, y: H - 6, "text-anchor": "middle", class: "axis" }, "fires on (share of counted tokens)"),
    svg("text", { x: 11, y: top + tall / 2, "text-anchor": "middle", class: "axis", transform: `rotate(-90 11 ${top + tall / 2})` }, "mean code when firing"),
    region, dot);
  const view = views[number];
  const at = (event) => {
    const box = picture.getBoundingClientRect(), scale = W / box.width;
    return [Math.max(left, Math.min(W - right, (event.clientX - box.left) * scale)), Math.max(top, Math.min(H - bottom, (event.clientY - box.top) * scale))];
  };
  const frame = (a, b) => {
    const box = { x: Math.min(a[0], b[0]), y: Math.min(a[1], b[1]), width: Math.abs(a[0] - b[0]), height: Math.abs(a[1] - b[1]) };
    for (const name of Object.keys(box)) region.setAttribute(name, box[name]);
    return box;
  };
  const backX = (x) => 10 ** (x0 + ((x - left) / wide) * (x1 - x0)), backY = (y) => 2 ** (y0 + ((top + tall - y) / tall) * (y1 - y0));
  let from = null;
  picture.addEventListener("pointerdown", (event) => { from = at(event); picture.setPointerCapture(event.pointerId); event.preventDefault(); });
  picture.addEventListener("pointermove", (event) => { if (from) frame(from, at(event)); });
  picture.addEventListener("pointerup", (event) => {
    const box = frame(from, at(event)), edge = 1e-9;
    from = null;
    view.brush = box.width < 3 || box.height < 3 ? null
      : [backX(box.x) * (1 - edge), backX(box.x + box.width) * (1 + edge), backY(box.y + box.height) * (1 - edge), backY(box.y) * (1 + edge)];
    if (!view.brush) frame([0, 0], [0, 0]);
    changed();
  });
  if (view.brush) frame([X(view.brush[0]), Y(view.brush[2])], [X(view.brush[1]), Y(view.brush[3])]);
  return {
    node: el("figure", {}, picture, el("figcaption", {}, "All features that fire; stronger colour, more features. Drag to list a region.")),
    clear: () => frame([0, 0], [0, 0]),
    mark: (x, y) => {
      const isPlace = typeof x === "number" && x > 0;
      dot.setAttribute("visibility", isPlace ? "visible" : "hidden");
      if (isPlace) { dot.setAttribute("cx", X(x)); dot.setAttribute("cy", Y(y)); }
    },
  };
}

function sliceBars(rates, numbers) {
  const top = Math.max(...rates) || 1, wide = Math.max(2, Math.min(7, Math.floor(48 / rates.length)));
  return svg("svg", { width: rates.length * (wide + 1), height: 14, role: "img", "aria-label": numbers, class: "slicebars" },
    svg("title", {}, numbers),
    rates.map((rate, s) => svg("rect", { x: s * (wide + 1), width: wide, y: 14 - Math.max(1, 14 * rate / top), height: Math.max(1, 14 * rate / top) })));
}
function spark(digits) {
  return svg("svg", { width: 4 * digits.length, height: 14, viewBox: `0 0 ${4 * digits.length} 14`, preserveAspectRatio: "none", "aria-hidden": "true", class: "spark" },
    svg("line", { x1: 0, x2: 4 * digits.length, y1: 13.5, y2: 13.5 }),
    [...digits].map((d, i) => (d === "0" ? null : svg("rect", { x: 4 * i, width: 3, y: 14 - 1.5 * d, height: 1.5 * d }))));
}

function meter(share, hot) {
  return svg("svg", { width: "100%", height: 8, preserveAspectRatio: "none", viewBox: "0 0 100 8", "aria-hidden": "true", class: hot ? "meter hot" : "meter" },
    svg("rect", { width: share > 0 ? Math.max(100 * share, 0.8) : 0, height: 8 }));
}

function histogram(site, feature) {
  const W = 300, H = 120, left = 12, bottom = 32, top = 14, [first, ...counts] = feature.histogram;
  const from = Math.floor(first / 8) * 8, to = Math.ceil((first + counts.length) / 8) * 8, wide = (W - 2 * left) / (to - from);
  const most = Math.max(1, ...counts), tall = H - bottom - top;
  const X = (code) => left + (W - 2 * left) * ((Math.log2(code) - Math.log2(site.edges[from])) / (Math.log2(site.edges[to]) - Math.log2(site.edges[from])));
  const parts = counts.map((n, i) => n ? svg("rect", { x: left + (first - from + i) * wide, width: Math.max(wide - 0.6, 0.6), y: top + tall - Math.max(0.7, (tall * n) / most), height: Math.max(0.7, (tall * n) / most) },
    svg("title", {}, `${short(site.edges[first + i])} to ${short(site.edges[first + i + 1])}: ${whole(n)} tokens`)) : null);
  const octaves = (to - from) / 8, every = Math.ceil(octaves / 8), ticks = [];
  for (let o = 0; o <= octaves; o += every) {
    const edge = site.edges[from + 8 * o];
    ticks.push(svg("line", { x1: X(edge), x2: X(edge), y1: top + tall, y2: top + tall + 4 }), svg("text", { x: X(edge), y: H - bottom + 15, "text-anchor": "middle" }, short(edge).replace(/\.?0+$/, "")));
  }
  const marks = [["p50", "median"], ["p99", "99 %"]].map(([key, name]) => [
    svg("line", { class: "mark", x1: X(feature[key]), x2: X(feature[key]), y1: top - 2, y2: top + tall }), svg("text", { x: X(feature[key]), y: top - 4, "text-anchor": "middle" }, name)]);
  return el("figure", {}, svg("svg", { viewBox: `0 0 ${W} ${H}`, class: "histogram", role: "img", "aria-label": `Histogram of ${feature.count} codes` },
    svg("line", { class: "base", x1: left, x2: W - left, y1: top + tall, y2: top + tall }),
    svg("g", { class: "cells" }, parts), svg("g", { class: "ticks" }, ticks, marks.flat()),
    svg("text", { x: W / 2, y: H - 3, "text-anchor": "middle", class: "axis" }, `code (log₂) · tallest bar ${whole(most)} tokens`)));
}
