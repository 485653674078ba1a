"use strict";

// Elements whose texts are texts: nothing that a model wrote is ever read as markup.

/** An element with attributes, listeners in `on`, and children that are elements or texts. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") {
      for (const [event, call] of Object.entries(value)) element.addEventListener(event, call);
    } else if (name.startsWith("aria-") && typeof value === "boolean") {
      element.setAttribute(name, String(value));
    } else if (value !== null && value !== undefined && value !== false) {
      element.setAttribute(name, value === true ? "" : String(value));
    }
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/** A button that does `call`. */
function button(text, call, attributes = {}) {
  return make("button", { type: "button", ...attributes, on: { click: call } }, text);
}

/** A control with its label beside it. */
function labelled(text, control, ...more) {
  labelled.count = (labelled.count ?? 0) + 1;
  control.id = `control-${labelled.count}`;
  return make(
    "span",
    { class: "labelled" },
    make("label", { for: control.id }, text),
    control,
    ...more,
  );
}

/** A labelled choice among `options`, each [value, text]; `call` gets the value. */
function choice(label, options, call) {
  const select = make(
    "select",
    { on: { change: () => call(select.value) } },
    options.map(([value, text]) => make("option", { value }, text)),
  );
  return labelled(label, select);
}

/** A labelled field of text; `call` gets what is in it, in lower case. */
function search(label, call) {
  const input = make("input", {
    type: "search",
    on: { input: () => call(input.value.trim().toLowerCase()) },
  });
  return labelled(label, input);
}

/** A part of the page with a heading and an address within it. */
function part(id, title, ...children) {
  const heading = make("h2", { id: `${id}-title` }, title);
  return make("section", { id, "aria-labelledby": `${id}-title` }, heading, ...children);
}

/** `text` on one line, cut to `length` characters. */
function oneLine(text, length) {
  const line = text
    .slice(0, 4 * length)
    .replace(/\s+/g, " ")
    .trim();
  return line.length > length ? `${line.slice(0, length - 1)}…` : line;
}

/** A text as it was written, in its own direction. */
function written(text, attributes = {}) {
  return make("div", { class: "written", dir: "auto", ...attributes }, visible(text));
}

/** `text` with signs that have no shape, or would turn what follows, in the open. */
function visible(text) {
  return text.replace(
    /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g,
    (sign) => `⟨U+${sign.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`,
  );
}
