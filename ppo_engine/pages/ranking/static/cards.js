// The prompt and the responses as elements.

import { markdown } from "./markdown.js";

const SHOWN = 20000; // characters of a text; the rest on demand

export function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

// A text that somebody else wrote: Markdown, or, where it is long and wanted whole, plain.
export function written({ text, thought, calls }) {
  const parts = document.createDocumentFragment();
  if (thought) parts.append(folded("Thought", thought));
  if (text.length > SHOWN) {
    const beginning = make("div", {}, markdown(text.slice(0, SHOWN)));
    const more = make("button", {
      type: "button",
      className: "more",
      textContent: `Show all ${text.length.toLocaleString("en")} characters`,
    });
    more.addEventListener("click", (event) => {
      event.stopPropagation();
      const whole = make("div", { className: "plain", dir: "auto", textContent: text });
      beginning.replaceWith(whole);
      more.remove();
    });
    parts.append(beginning, more);
  } else if (text.trim()) {
    parts.append(markdown(text));
  } else {
    parts.append(make("p", { className: "empty", textContent: "(empty)" }));
  }
  for (const call of calls ?? []) parts.append(folded("Tool call", call));
  return parts;
}

function folded(title, text) {
  const whole = make("div", { className: "plain thought", dir: "auto", textContent: text });
  return make("details", { open: true }, make("summary", { textContent: title }), whole);
}

// The messages of a prompt, or its text, which has no role; and the tools that it offers.
export function prompt(messages, tools) {
  const parts = messages.map((message) => {
    const text = make("div", { className: "text" }, written(message));
    const role = make("div", { className: "role", textContent: message.role });
    return make("div", { className: "message" }, ...(message.role ? [role] : []), text);
  });
  if (tools.length) {
    const told = JSON.stringify(tools, null, 2);
    const listed = make("pre", { textContent: told });
    parts.push(make("details", {}, make("summary", { textContent: "Tools" }), listed));
  }
  return parts;
}

// A response, without anything that would tell where it comes from.
export function card(response, number, choose) {
  const title = make("h3", { id: `title-${number}`, textContent: `Response ${number}` });
  const rank = make("span", { className: "rank", id: `rank-${number}` });
  const head = make("header", {}, title, rank);
  if (!response.finished) {
    head.append(
      make("span", {
        className: "cut",
        title: "It was cut at the length limit: it did not end by itself.",
        textContent: "cut off",
      }),
    );
  }
  const button = make("button", { type: "button", className: "choose" });
  head.append(button);
  const text = make(
    "div",
    { className: "text", tabIndex: 0, role: "region", ariaLabel: `Text of response ${number}` },
    written(response),
  );
  const element = make("article", { className: "card", draggable: true }, head, text);
  element.setAttribute("aria-labelledby", title.id);
  element.addEventListener("click", (event) => {
    const inside = event.target.closest("button, summary, a, pre");
    const selection = window.getSelection();
    const selecting = !selection.isCollapsed && element.contains(selection.anchorNode);
    if (inside ? inside === button : !selecting) choose(event);
  });
  return element;
}
