// Markdown as elements, made by hand: whatever a text holds enters by textContent alone, so that it
// is shown and never run. A link is its text with its address behind it, and leads nowhere.

// Bounded, so that a text of a megabyte takes a moment, whatever it holds.
const INLINE = new RegExp(
  [
    /(?<tick>`{1,3})(?<code>[^`\n]{1,5000})\k<tick>/,
    // Not within a word, nor beside a space: that is a product or a power.
    /(?<![\w*])\*\*(?<strong>[^*\s](?:[^*\n]{0,5000}[^*\s])?)\*\*(?![\w*])/,
    /(?<![\w*])\*(?<em>[^*\s](?:[^*\n]{0,5000}[^*\s])?)\*(?![\w*])/,
    /!?\[(?<label>[^[\]\n]{0,1000})\]\((?<address>[^()\s]{1,2000})\)/,
  ]
    .map((part) => part.source)
    .join("|"),
  "g",
);
// And what language it says, if any; with backticks behind it, it is code within a line.
const FENCE = /^ {0,3}(`{3,}(?=[^`]*$)|~{3,})(.*)$/;
const HEADING = /^(#{1,6}) +(.*)$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)]) +(.*)$/;
const QUOTE = /^ {0,3}> ?/;
const RULE = /^ {0,3}([-*_])( *\1){2,} *$/;
const TABLE = /^ {0,3}\|/;
const DEEPEST = 6; // quotes within quotes

// The text as a fragment of block elements, each in the direction of its own script.
export function markdown(text, depth = 0) {
  const blocks = document.createDocumentFragment();
  const lines = text.split("\n");
  for (let at = 0; at < lines.length;) {
    const line = lines[at];
    const fence = FENCE.exec(line);
    if (fence) {
      const [, mark, language] = fence;
      const closes = new RegExp(`^ {0,3}${mark[0]}{${mark.length},}\\s*$`);
      const end = until(lines, at + 1, (other) => closes.test(other));
      if (language.trim()) blocks.append(named("div", language.trim(), "language"));
      blocks.append(code(lines.slice(at + 1, end).join("\n")));
      at = end + 1;
    } else if (!line.trim()) {
      at += 1;
    } else if (RULE.test(line)) {
      blocks.append(document.createElement("hr"));
      at += 1;
    } else if (HEADING.test(line)) {
      const [, marks, words] = HEADING.exec(line);
      blocks.append(block(`h${Math.min(6, 3 + marks.length)}`, words));
      at += 1;
    } else if (QUOTE.test(line) && depth < DEEPEST) {
      const end = until(lines, at, (other) => !QUOTE.test(other));
      const quote = document.createElement("blockquote");
      const inside = lines.slice(at, end).map((other) => other.replace(QUOTE, ""));
      quote.append(markdown(inside.join("\n"), depth + 1));
      blocks.append(quote);
      at = end;
    } else if (ITEM.test(line)) {
      at = list(blocks, lines, at);
    } else if (TABLE.test(line)) {
      const end = until(lines, at, (other) => !TABLE.test(other));
      blocks.append(code(lines.slice(at, end).join("\n")));
      at = end;
    } else {
      const end = until(lines, at + 1, begins);
      blocks.append(block("p", lines.slice(at, end).join("\n")));
      at = end;
    }
  }
  return blocks;
}

function begins(line) {
  return !line.trim() || [FENCE, HEADING, ITEM, QUOTE, RULE, TABLE].some((r) => r.test(line));
}

function until(lines, from, ends) {
  let at = from;
  while (at < lines.length && !ends(lines[at])) at += 1;
  return Math.max(at, from);
}

// Appends the list that begins at a line, nested by indentation; returns where it ends.
function list(blocks, lines, from) {
  const open = []; // lists by their indentation, the innermost last
  let at = from;
  while (at < lines.length && ITEM.test(lines[at])) {
    const [, indent, mark, first] = ITEM.exec(lines[at]);
    const end = until(lines, at + 1, begins);
    while (open.length > 1 && indent.length < open.at(-1).indent) open.pop();
    const kind = /\d/.test(mark) ? "ol" : "ul";
    const deeper = !open.length || (indent.length > open.at(-1).indent && open.length < DEEPEST);
    const another = !deeper && open.at(-1).element.localName !== kind;
    if (another) open.pop();
    if (deeper || another) {
      const element = document.createElement(kind);
      (open.length ? open.at(-1).element.lastChild : blocks).append(element);
      open.push({ indent: indent.length, element });
    }
    const words = [first, ...lines.slice(at + 1, end).map((line) => line.trim())];
    const item = block("li", words.join("\n"));
    if (kind === "ol") item.value = parseInt(mark, 10); // as it is written, not as it is counted
    open.at(-1).element.append(item);
    at = end;
  }
  return at;
}

function block(name, text) {
  const element = document.createElement(name);
  element.dir = "auto";
  element.append(inline(text));
  return element;
}

function code(text) {
  const element = document.createElement("pre");
  element.dir = "ltr";
  element.tabIndex = 0; // it may scroll
  element.append(named("code", text));
  return element;
}

function inline(text) {
  const parts = document.createDocumentFragment();
  let at = 0;
  for (const found of text.matchAll(INLINE)) {
    const { code, strong, em, label, address } = found.groups;
    parts.append(text.slice(at, found.index));
    if (code !== undefined) parts.append(named("code", code));
    else if (strong !== undefined) parts.append(named("strong", strong));
    else if (em !== undefined) parts.append(named("em", em));
    else {
      parts.append(label, named("span", ` (${address})`, "address"));
    }
    at = found.index + found[0].length;
  }
  parts.append(text.slice(at));
  return parts;
}

function named(name, text, className = "") {
  const element = document.createElement(name);
  element.textContent = text;
  if (className) element.className = className;
  return element;
}
