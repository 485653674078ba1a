// The page, from its data.

function build() {
  const data = JSON.parse(document.getElementById("data").textContent);
  COLORS.read();
  const curves = new Curves(data);
  const parts = [
    notes(data),
    curves.root,
    new Rollouts(data).root,
    heldOut(data),
    settings(data),
  ].filter(Boolean);
  const links = parts.map((one) =>
    make("a", { href: `#${one.id}` }, one.querySelector("h2").textContent),
  );
  document.getElementById("page").append(
    make(
      "header",
      {},
      make("h1", {}, data.runs.map((run) => run.name).join(", ")),
      legend(data, (number, shown) => curves.show(number, shown)),
      make("nav", { "aria-label": "Parts of the page" }, links),
    ),
    ...parts,
    make(
      "footer",
      { class: "hint" },
      `Written ${data.made} by ppo-engine. docs/metrics.md says what each metric means, ` +
        "docs/failures.md what goes wrong.",
    ),
  );
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    COLORS.read();
    SIGHT.refresh();
  });
  document.documentElement.dataset.ready = String(performance.now());
}

build();
