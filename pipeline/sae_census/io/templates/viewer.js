// The pages: a table of features for each SAE, and one feature with its spans; the address says which.

const facts = JSON.parse(document.getElementById("facts").textContent);
const main = document.getElementById("main"), readout = document.getElementById("readout");
const ROWS = 50, KEPT_CHUNKS = 24;

// ---------- data files ----------

const loads = new Map();
window.census = (name, value) => { if (loads.has(name)) loads.get(name).resolve(value); };
function load(name) {
  if (!loads.has(name)) {
    const entry = {};
    entry.promise = new Promise((resolve, reject) => { entry.resolve = resolve; entry.reject = reject; });
    loads.set(name, entry);
    const script = el("script", { src: `${facts.data}/${name}.js` });
    script.onload = () => script.remove();
    script.onerror = () => { loads.delete(name); script.remove(); entry.reject(new Error(`${facts.data}/${name}.js`)); };
    document.head.append(script);
    const chunks = [...loads.keys()].filter((key) => !key.endsWith("table"));
    if (chunks.length > KEPT_CHUNKS) loads.delete(chunks[0]);
  }
  return loads.get(name).promise;
}

/** The table of an SAE as columns by feature id, with what sorting and searching need. */
async function columnsOf(number) {
  const table = await load(`${number}/table`);
  if (table.id) return table;
  const site = facts.sites[number], tokens = site.slice_tokens.reduce((a, b) => a + b, 0);
  const columns = table;
  columns.id = table.rank.map((_, id) => id);
  columns.frequency = table.count.map((count) => (tokens ? count / tokens : 0));
  columns.name = table.label.map((label, id) => label ?? table.proto_label[id] ?? "");
  columns.slices = columns.id.map((id) => table.slice_count.map((counts, s) =>
    site.slice_tokens[s] ? counts[id] / site.slice_tokens[s] : 0));
  columns.uneven = columns.slices.map((rates, id) => (columns.frequency[id] ? Math.max(...rates) / columns.frequency[id] : 0));
  columns.folded = columns.name.map(fold);
  return columns;
}
const fold = (text) => text.toUpperCase().toLowerCase();

// ---------- which features, in which order ----------

const views = facts.sites.map(() => ({ sort: "rank", down: false, text: "", brush: null, at: 0, order: null }));
function ordered(number, columns) {
  const view = views[number];
  if (view.order) return view.order;
  const wanted = fold(view.text.trim()), key = columns[view.sort];
  const words = new Set();
  if (wanted) columns.words.forEach((word, i) => { if (word.includes(wanted)) words.add(i); });
  const isShown = (id) => {
    if (view.brush && !inside(view.brush, columns.frequency[id], columns.mean_when_firing[id])) return false;
    return !wanted || String(id) === wanted || columns.folded[id].includes(wanted) || columns.peaks[id].some((w) => words.has(w));
  };
  const sign = view.down ? -1 : 1;
  const compare = (a, b) => (key[a] < key[b] ? -sign : key[a] > key[b] ? sign : columns.rank[a] - columns.rank[b]);
  view.order = columns.id.filter(isShown).sort(compare);
  return view.order;
}
const inside = (brush, x, y) => x >= brush[0] && x < brush[1] && y >= brush[2] && y < brush[3];

// ---------- addresses ----------

const address = (number, id) => "#" + encodeURI(facts.sites[number].site) + (id === undefined ? "" : `/${id}`);
function place() {
  let hash = location.hash.slice(1);
  try { hash = decodeURI(hash); } catch { /* not an address of ours: the first SAE is shown */ }
  const number = facts.sites.findIndex(({ site }) => hash === site || hash.startsWith(site + "/"));
  if (number < 0) return { number: 0 };
  const rest = hash.slice(facts.sites[number].site.length + 1);
  return { number, id: /^\d+$/.test(rest) && Number(rest) < facts.sites[number].num_features ? Number(rest) : undefined };
}

let drawn = 0, scrolled = 0, wasList = false;
async function draw() {
  const { number, id } = place(), mine = ++drawn;
  if (wasList) scrolled = scrollY;
  readout.textContent = "";
  try {
    const columns = await columnsOf(number);
    const node = id === undefined ? listView(number, columns) : await featureView(number, columns, id);
    if (mine !== drawn) return;
    heading(number, id);
    main.replaceChildren(node);
    scrollTo(0, id === undefined && !wasList ? scrolled : id === undefined ? scrollY : 0);
    wasList = id === undefined;
  } catch (error) {
    if (mine !== drawn) return;
    heading(number, id);
    main.replaceChildren(el("p", { class: "notice" }, `A data file of this report cannot be read: ${error.message}`));
  }
}

function heading(number, id) {
  document.title = (id === undefined ? "" : `${id} · `) + `${facts.name} ${facts.snapshot}`;
  const tabs = facts.sites.map(({ site }, i) =>
    el("a", { href: address(i), "aria-current": i === number ? "page" : null }, isolated(site)));
  document.getElementById("top").replaceChildren(
    el("h1", {}, el("a", { href: address(number) }, isolated(facts.name)), el("small", {}, ` snapshot ${facts.snapshot}`)),
    el("nav", { "aria-label": "SAEs" }, tabs));
  document.getElementById("keys").replaceChildren(
    ...[["j k", "next, previous"], ["⏎", "open"], ["/", "search"], ["Esc", "back to the table"], ["a", "align or wrap"], ["b", "line breaks"]]
      .flatMap(([key, does]) => [el("kbd", {}, key), ` ${does}  `]));
}

// ---------- the table ----------

const COLUMNS = [
  ["rank", "rank", "Place by the score of this catalog: " + facts.score + ". Ties go to the lower id."],
  ["id", "feature", "The feature's id in its SAE."],
  ["frequency", "fires on", "Counted tokens on which it fires (code > 0), as a share of all counted tokens."],
  ["uneven", "slices", "Its frequency in every slice, the highest as a full bar; sorted by highest slice over all."],
  ["mean_when_firing", "mean", "Mean code over the tokens on which it fires."],
  ["max", "max", "Largest code."],
  ["p50", "codes", "Histogram of its codes in half octaves, on the same axis for all features; sorted by the median."],
  ["name", "label", "A label (bold), or a proto-label made of words at, before and near the peaks of its spans."],
];

function listView(number, columns) {
  const view = views[number], site = facts.sites[number];
  const search = el("input", {
    type: "search", id: "search", placeholder: "label, peak token, or feature id", "aria-label": "Search features", value: view.text,
    autocomplete: "off", spellcheck: "false",
    oninput: () => { view.text = search.value; changed(); },
    onkeydown: (event) => {
      const text = search.value.trim();
      if (event.key === "Enter" && /^\d+$/.test(text) && Number(text) < site.num_features) location.hash = address(number, text);
      else if (event.key === "Enter") search.blur();
    },
  });
  const body = el("tbody"), head = el("tr"), pager = el("div", { class: "pager" });
  const plot = cloud(number, columns, () => changed());
  function changed() { view.order = null; view.at = 0; fill(); }
  function fill() {
    const order = ordered(number, columns), first = Math.floor(view.at / ROWS) * ROWS;
    head.replaceChildren(...COLUMNS.map(([key, name, meaning]) => {
      const sorted = view.sort === key ? (view.down ? "descending" : "ascending") : null;
      return el("th", { scope: "col", class: `c-${key}`, "aria-sort": sorted }, el("button", {
        type: "button", title: meaning,
        onclick: () => {
          view.down = view.sort === key ? !view.down : !["rank", "id", "name"].includes(key);
          view.sort = key;
          changed();
        },
      }, name));
    }));
    body.replaceChildren(...order.slice(first, first + ROWS).map((id, i) => row(number, columns, id, first + i, plot)));
    const step = (to, name) => el("button", {
      type: "button", disabled: to < 0 || to >= order.length, onclick: () => { view.at = to; fill(); },
    }, name);
    const bounds = order.length ? `${whole(first + 1)}–${whole(Math.min(first + ROWS, order.length))} of ${whole(order.length)}` : "no such feature";
    pager.replaceChildren(
      step(first - ROWS, "‹ previous"), el("span", { role: "status" }, bounds), step(first + ROWS, "next ›"),
      view.brush ? el("button", { type: "button", onclick: () => { view.brush = null; plot.clear(); changed(); } }, "clear region") : "");
  }
  listView.fill = fill;
  fill();
  return el("div", {},
    el("div", { class: "overview" }, about(), aboutSae(number), plot.node),
    el("div", { class: "bar" }, search, pager),
    el("div", { class: "scroll" }, el("table", { class: "features" },
      el("caption", { class: "quiet" }, "Features"), el("thead", {}, head), body)));
}

function row(number, columns, id, index, plot) {
  const site = facts.sites[number], rates = columns.slices[id], view = views[number];
  const numbers = rates.map((rate, s) => `${site.slices[s]} ${percent(rate)}`).join(", ");
  const mark = () => plot.mark(columns.frequency[id], columns.mean_when_firing[id]);
  return el("tr", { class: (columns.count[id] ? "" : "dead ") + (index === view.at && index ? "at" : ""), onpointerenter: mark, onfocusin: mark, onpointerleave: plot.mark },
    el("td", { class: "c-rank" }, columns.rank[id]),
    el("td", { class: "c-id" }, el("a", { href: address(number, id), onclick: () => { view.at = index; } }, id)),
    el("td", { class: "c-frequency", title: oneIn(columns.frequency[id]) }, percent(columns.frequency[id])),
    el("td", { class: "c-uneven" }, sliceBars(rates, numbers)),
    el("td", { class: "c-mean_when_firing" }, short(columns.mean_when_firing[id])),
    el("td", { class: "c-max" }, short(columns.max[id])),
    el("td", { class: "c-p50" }, spark(columns.sparks[id])),
    el("td", { class: "c-name" }, label(columns.label[id], columns.proto_label[id])));
}
const label = (own, proto) => (own !== null ? el("strong", {}, isolated(own)) : proto !== null ? el("em", {}, isolated(proto)) : "");

// ---------- what the catalog is ----------

const terms = (pairs) => el("dl", {}, pairs.filter(Boolean).map(([name, value, meaning]) =>
  [el("dt", { title: meaning || null }, name), el("dd", { title: null }, value)]));
const RULES = { padding: "padding", special_tokens: "special tokens", first_positions: "first positions", positions: "chosen positions", max_norm_ratio: "outlier norms", attention_sinks: "attention sinks" };

function about() {
  const total = facts.slices.reduce((sum, one) => sum + one[1], 0), weights = new Map(facts.weights);
  const masks = [
    facts.masks.special_tokens && "special tokens",
    facts.masks.first_positions && `the first ${facts.masks.first_positions === 1 ? "position" : facts.masks.first_positions + " positions"} of a context`,
    facts.masks.positions.length && `positions ${facts.masks.positions.join(", ")}`,
    facts.masks.max_norm_ratio && `tokens with more than ${facts.masks.max_norm_ratio} × the median norm`,
    facts.masks.attention_sinks && "attention sinks",
  ].filter(Boolean).join("; ");
  return el("details", { open: innerWidth > 640 },
    el("summary", {}, el("h2", {}, "Catalog")),
    terms([
      ["model", isolated(facts.model + (facts.revision ? ` @ ${facts.revision}` : ""))],
      ["computed in", `${facts.dtype}, contexts of ${facts.context_length} tokens`],
      ["not counted", masks || "nothing but padding"],
      ["coverage", facts.shards_missing ? `${facts.shards} shards; ${facts.shards_missing} failed and are missing` : `all ${facts.shards} shards`],
      facts.records_dropped.length && ["left out", shown(facts.records_dropped.map(([reason, n]) => `${whole(n)} records: ${reason}`).join("; "))],
      facts.documents_with_bos && ["BOS", `${whole(facts.documents_with_bos)} documents brought their own`],
      facts.tokens_truncated && ["truncated", `${whole(facts.tokens_truncated)} tokens`],
      facts.features_with_spans !== null && ["spans", `only of the ${whole(facts.features_with_spans)} best ranked features of each SAE`],
      ["digest", el("code", { title: facts.digest }, facts.digest.slice(0, 16))],
    ]),
    el("table", { class: "slices" },
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "slice"), el("th", { scope: "col" }, "tokens"), el("th", { "aria-hidden": "true" }))),
      el("tbody", {}, facts.slices.map(([name, tokens]) => el("tr", {},
        el("th", { scope: "row" }, isolated(name), weights.has(name) ? ` × ${weights.get(name)}` : ""),
        el("td", {}, whole(tokens)), el("td", { class: "meter" }, meter(tokens / total)))))));
}
function aboutSae(number) {
  const site = facts.sites[number], books = new Map(site.tokens), counted = books.get("counted");
  const excluded = site.tokens.filter(([rule, n]) => rule !== "counted" && n);
  return el("details", { open: innerWidth > 640 },
    el("summary", {}, el("h2", {}, isolated(site.site))),
    terms([
      ["features", whole(site.num_features)],
      ["dead", `${whole(site.dead)} (${percent(site.dead / Math.max(site.num_features, 1))})`, "Features that fire on no counted token."],
      ["L0", `${site.l0_is_bound ? "at least " : ""}${short(site.l0)}`, "Mean number of features that fire on a token."],
      ["FVU", site.fvu === null ? "unknown" : short(site.fvu), "Fraction of the variance of activations that the SAE leaves unexplained, on a sample of tokens: 0 is perfect, 1 is no better than the mean."],
      ["tokens counted", whole(counted), "What frequencies are shares of."],
      ...excluded.map(([rule, n]) => [el("span", { class: "sub" }, `not: ${RULES[rule] || rule}`), whole(n), "Tokens that this rule excludes; each token is booked under the first rule that fits."]),
      ["digest", el("code", { title: site.digest }, site.digest.slice(0, 16))],
    ]));
}

// ---------- one feature ----------

const STATISTICS = [
  ["count", "fires on tokens", "Counted tokens with a code above 0.", whole],
  ["frequency", "frequency", "Counted tokens on which it fires / counted tokens.", (x) => `${percent(x)}  (${oneIn(x)})`],
  ["context_frequency", "contexts", "Contexts in which it fires at least once / all contexts.", percent],
  ["max", "max", "Largest code.", short],
  ["mean_when_firing", "mean when firing", "Mean code over the tokens on which it fires.", short],
  ["p50", "median", "Of the codes of firing tokens, from the histogram: off by at most 5.9 %.", short],
  ["p95", "95th percentile", "Of the codes of firing tokens, from the histogram: off by at most 5.9 %.", short],
  ["p99", "99th percentile", "Of the codes of firing tokens, from the histogram: off by at most 5.9 %.", short],
  ["mean", "mean", "Over all counted tokens, silent ones as 0.", short],
  ["std", "std", "Over all counted tokens, silent ones as 0; population form.", short],
  ["score", facts.score, "The score that ranks features in this catalog.", short],
  ["decoder_norm", "decoder norm", "Length of the feature's decoder row.", short],
];
let isAligned = true, hasBreaks = false;

async function featureView(number, columns, id) {
  const chunk = await load(`${number}/${Math.floor(id / facts.chunk)}`);
  const site = facts.sites[number], feature = chunk.features[id % facts.chunk], order = ordered(number, columns);
  const at = order.indexOf(id);
  if (at >= 0) views[number].at = at;
  const step = (by, name) => {
    const to = order[at + by];
    return at < 0 || to === undefined ? el("span", { class: "off" }, name) : el("a", { href: address(number, to), rel: by > 0 ? "next" : "prev" }, name);
  };
  const toggle = (name, isOn, flip) => {
    const button = el("button", { type: "button", "aria-pressed": String(isOn()), onclick: () => { flip(); button.setAttribute("aria-pressed", String(isOn())); restyle(); } }, name);
    return button;
  };
  const spans = el("div", { class: "spans" }, spanGroups(site, chunk, feature));
  const restyle = () => { spans.classList.toggle("aligned", isAligned); spans.classList.toggle("breaks", hasBreaks); };
  featureView.restyle = restyle;
  restyle();
  follow(spans, chunk);
  return el("article", {},
    el("div", { class: "title" },
      el("h2", {}, el("span", { class: "number" }, id), " ", label(feature.label, feature.proto_label)),
      el("nav", { "aria-label": "Features" }, step(-1, "‹ previous"),
        el("span", {}, at < 0 ? "not in the list" : `${whole(at + 1)} of ${whole(order.length)}`), step(1, "next ›"))),
    el("div", { class: "columns" },
      el("aside", {},
        el("p", { class: "rank" }, `rank ${whole(feature.rank)} of ${whole(site.num_features)} by ${facts.score}`),
        feature.dead ? el("p", { class: "notice" }, "Dead: it fires on no counted token.") : histogram(site, feature),
        terms(STATISTICS.map(([key, name, meaning, format]) => [name, el("span", { title: String(feature[key]) }, format(feature[key])), meaning])),
        slicesTable(site, feature), logits(feature),
        el("details", {}, el("summary", {}, "What the numbers mean"),
          el("dl", { class: "meanings" }, STATISTICS.map(([, name, meaning]) => [el("dt", {}, name), el("dd", {}, meaning)])))),
      el("section", { "aria-label": "Spans" },
        el("div", { class: "bar" },
          toggle("aligned at the peak", () => isAligned, () => { isAligned = !isAligned; }),
          toggle("line breaks", () => hasBreaks, () => { hasBreaks = !hasBreaks; if (hasBreaks) isAligned = false; spans.previousSibling.firstChild.setAttribute("aria-pressed", String(isAligned)); }),
          el("span", { class: "quiet" }, "shaded by code, up to the feature's maximum; a peak is underlined")),
        spans)));
}

function slicesTable(site, feature) {
  const rates = feature.slices.frequency, top = Math.max(...rates) || 1;
  return el("table", { class: "slices" },
    el("thead", {}, el("tr", {}, ["slice", "fires on", "", "mean", "max"].map((name) => el("th", { scope: "col" }, name)))),
    el("tbody", {}, site.slices.map((name, s) => el("tr", { title: `${whole(feature.slices.count[s])} of ${whole(feature.slices.tokens_counted[s])} counted tokens` },
      el("th", { scope: "row" }, isolated(name)), el("td", {}, percent(rates[s])), el("td", { class: "meter" }, meter(rates[s] / top)),
      el("td", {}, short(feature.slices.mean_when_firing[s])), el("td", {}, short(feature.slices.max[s]))))));
}

function logits(feature) {
  const lists = [["promotes", feature.positive], ["suppresses", feature.negative]].filter(([, rows]) => rows);
  if (!lists.length) return "";
  const most = Math.max(...lists.flatMap(([, rows]) => rows.map((entry) => Math.abs(entry[2])))) || 1;
  return el("div", { class: "logits" }, lists.map(([name, rows]) => el("table", { class: "slices" },
    el("caption", { title: "Direct effect of the decoder row on the logits." }, name),
    el("tbody", {}, rows.map(([id, token, logit]) => el("tr", {},
      el("th", { scope: "row", title: `token ${id}` }, isolated(token, { class: "token" })), el("td", {}, short(logit)),
      el("td", { class: "meter" }, meter(Math.abs(logit) / most, logit > 0))))))));
}

/** Title, meaning, and the range of codes [low, high) of a span group. */
function groupFacts(name, feature, site) {
  const [first, ...counts] = feature.histogram, edges = site.edges;
  const topOctave = Math.floor((first + counts.length - 1) / 8);
  const share = (low, high) => counts.reduce((sum, n, i) => sum + (first + i >= low && first + i < high ? n : 0), 0) / Math.max(feature.count, 1);
  if (name === "top") return ["Top", "the strongest contexts"];
  if (name === "random") return ["Random", "firings drawn by a hash: what it usually does"];
  if (name === "non_activating") return ["Silent", "contexts drawn by a hash in which it never fires"];
  if (name === "low_activating") return ["Low", `firings at least two octaves below the maximum's: ${percent(share(0, 8 * (topOctave - 1)))} of its firings`];
  const low = 8 * (topOctave - Number(name.slice(5)));
  if (low < 0) return [name, ""];
  return [`Codes ${edges[low]} to ${edges[low + 8]}`, `firings drawn by a hash from this octave of codes: ${percent(share(low, low + 8))} of its firings`];
}

function spanGroups(site, chunk, feature) {
  if (!feature.firings?.length) {
    const bound = facts.features_with_spans;
    return el("p", { class: "notice" }, bound !== null && feature.rank > bound
      ? `Spans are shown of the ${whole(bound)} best ranked features; this one has rank ${whole(feature.rank)}. The catalog has them.` : "The catalog has no spans of this feature.");
  }
  return facts.groups.map((name, g) => {
    const members = feature.groups[g], hidden = feature.collapsed[g];
    if (!members.length) return null;
    const [title, meaning] = groupFacts(name, feature, site);
    return el("section", {}, el("h3", {}, title, el("small", {}, ` ${meaning}`),
      hidden ? el("small", { class: "collapsed", title: "Spans that agree with a better one of this group in eight tokens before the peak and four from it on." }, ` · ${hidden} near duplicate${hidden > 1 ? "s" : ""} not shown`) : ""),
      members.map((m) => spanLine(site, chunk, feature, feature.firings[m])));
  });
}

function spanLine(site, chunk, feature, [slice, document_, shard, context, position, start, value, tokens, at, codes]) {
  const code = new Map(at.map((offset, i) => [offset, codes[i]])), peak = position - start;
  const nodes = tokens.map((token, offset) => {
    const c = code.get(offset) || 0, node = el("span", { class: offset === peak ? "token peak" : "token" },
      shown(chunk.tokens[token][1]) || (offset === peak ? "\ufffd" : ""));  // a part of a character, which stands at its last token
    if (c) node.style.setProperty("--heat", (0.1 + (0.9 * c) / feature.max).toFixed(3));
    node.told = [token, c, start + offset];
    return node;
  });
  const line = el("div", { class: "line" },
    el("button", { type: "button", class: "value", "aria-expanded": "false", "aria-label": `code ${short(value)}; show the whole span`, onclick: () => line.firstChild.setAttribute("aria-expanded", String(line.classList.toggle("open"))) }, value ? short(value) : "·"),
    el("div", { class: "text" }, el("div", { class: "left" }, el("span", {}, nodes.slice(0, peak))), el("div", { class: "right" }, nodes.slice(peak))),
    el("div", { class: "where" }, isolated(site.slices[slice]), " ", el("span", { title: `document ${chunk.documents[document_]}, shard ${chunk.shards[shard]}, context ${context}, position ${position}` }, `${chunk.documents[document_].slice(0, 8)}:${position}`)));
  return line;
}

/** Say token, id and code of what the pointer is on. */
function follow(spans, chunk) {
  const tell = (event) => {
    const node = event.target.closest?.(".token");
    if (!node || !node.told) { readout.textContent = ""; return; }
    const [token, code, position] = node.told, [id, text] = chunk.tokens[token];
    readout.replaceChildren(el("span", { class: "token" }, "‘", shown(text) || "\ufffd", "’"), ` id ${id} · position ${position} · code `, el("b", {}, code ? String(code) : "0"));
  };
  spans.addEventListener("pointerover", tell);
  spans.addEventListener("click", tell);
  spans.addEventListener("pointerleave", () => { readout.textContent = ""; });
}

// ---------- keys ----------

async function move(by) {
  const { number, id } = place(), columns = await columnsOf(number), order = ordered(number, columns), view = views[number];
  const to = Math.max(0, Math.min(order.length - 1, view.at + by));
  if (id !== undefined) {
    const next = order[order.indexOf(id) + by];
    if (next !== undefined) location.hash = address(number, next);
    return;
  }
  const chosen = document.querySelector("tr.at");
  view.at = chosen ? to : Math.floor(view.at / ROWS) * ROWS;
  listView.fill();
  const line = document.querySelectorAll("table.features tbody tr")[view.at % ROWS];
  document.querySelectorAll("tr.at").forEach((node) => node.classList.remove("at"));
  if (line) { line.classList.add("at"); line.querySelector("a").focus({ preventScroll: true }); line.scrollIntoView({ block: "nearest" }); }
}
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const { number, id } = place(), isTyping = event.target.tagName === "INPUT";
  if (event.key === "Escape") {
    if (isTyping) event.target.blur();
    else if (id !== undefined) location.hash = address(number);
    return;
  }
  if (isTyping) return;
  const keys = {
    j: () => move(1), k: () => move(-1), ArrowRight: () => id !== undefined && move(1), ArrowLeft: () => id !== undefined && move(-1),
    "/": () => {
      if (id !== undefined) { location.hash = address(number); addEventListener("hashchange", () => setTimeout(() => document.getElementById("search")?.focus(), 60), { once: true }); }
      else document.getElementById("search").focus();
    },
    a: () => id !== undefined && document.querySelector("article .bar button").click(),
    b: () => id !== undefined && document.querySelectorAll("article .bar button")[1].click(),
  };
  if (Object.hasOwn(keys, event.key)) { if (event.key === "/") event.preventDefault(); keys[event.key](); }
});
addEventListener("hashchange", draw);
draw();
