// A table whose rows are sorted by its headings, filtered, and shown a page at a time.

const PAGE = 100; // rows

class SortedTable {
  /**
   * `columns` are {name, get(row), show(row) or none, text: whether it is text}; `choose(row)` is
   * called for a row that somebody opens; the `label` says what the table holds.
   */
  constructor(label, columns, rows, choose = null) {
    Object.assign(this, { columns, rows, choose });
    this.order = null; // [column, 1 or -1]
    this.keep = () => true;
    this.count = PAGE;
    this.body = make("tbody");
    this.heads = columns.map((column) => {
      const sort = button(column.name, () => this.sort(column), { class: "sort" });
      return make("th", { scope: "col" }, sort);
    });
    this.more = button("", () => {
      this.count += PAGE;
      this.draw();
    });
    this.said = make("p", { class: "hint", "aria-live": "polite" });
    this.root = make(
      "div",
      { class: "scroll" },
      make(
        "table",
        { class: "sorted", "aria-label": label },
        make("thead", {}, make("tr", {}, this.heads)),
        this.body,
      ),
      this.said,
      this.more,
    );
    this.draw();
  }

  filter(keep) {
    this.keep = keep;
    this.count = PAGE;
    this.draw();
  }

  sort(column) {
    const same = this.order?.[0] === column;
    this.order = [column, same ? -this.order[1] : column.text ? 1 : -1];
    this.draw();
  }

  /** The rows that are there to be seen, in their order; what has no number comes last. */
  get sorted() {
    const found = this.rows.filter(this.keep);
    if (!this.order) return found;
    const [column, sign] = this.order;
    const missing = (value) => value === null || value === undefined || Number.isNaN(value);
    return found.sort((one, other) => {
      const [a, b] = [column.get(one), column.get(other)];
      if (missing(a) || missing(b)) return missing(a) - missing(b);
      return sign * (column.text ? String(a).localeCompare(String(b)) : a - b);
    });
  }

  draw() {
    const rows = this.sorted;
    this.columns.forEach((column, i) => {
      const sign = this.order?.[0] === column ? this.order[1] : 0;
      this.heads[i].setAttribute(
        "aria-sort",
        { 1: "ascending", "-1": "descending", 0: "none" }[sign],
      );
    });
    this.body.replaceChildren(...rows.slice(0, this.count).map((row) => this.line(row)));
    const left = rows.length - this.count;
    this.said.textContent = `${figure(rows.length)} of ${figure(this.rows.length)} rows`;
    this.more.hidden = left <= 0;
    this.more.textContent = `Show more (${figure(left)})`;
  }

  line(row) {
    const cells = this.columns.map((column, i) => {
      const value = column.show ? column.show(row) : figure(column.get(row));
      const inside =
        i === 0 && this.choose ? button(value, () => this.choose(row), { class: "open" }) : value;
      return make(
        "td",
        { class: column.text ? "text" : "number", dir: column.text ? "auto" : null },
        inside,
      );
    });
    const on = this.choose
      ? { click: (event) => event.target.closest("button") ?? this.choose(row) }
      : {};
    return make("tr", { class: this.choose ? "opens" : null, on }, cells);
  }
}
