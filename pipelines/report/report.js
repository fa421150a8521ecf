"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const original = [...body.rows];
  const value = (row, place) => {
    const cell = row.cells[place];
    if (cell.dataset.v !== undefined) return cell.dataset.v === "" ? null : Number(cell.dataset.v);
    return cell.textContent;
  };
  const order = (place, down) => (one, other) => {
    const a = value(one, place), b = value(other, place);
    if (a === null || b === null) return (a === null) - (b === null);
    const found = typeof a === "number" ? a - b : a.localeCompare(b, undefined, {numeric: true});
    return down ? -found : found;
  };
  heads.forEach((head, place) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const state = head.getAttribute("aria-sort");
      heads.forEach(other => other.removeAttribute("aria-sort"));
      if (state === "descending") return body.append(...original);
      head.setAttribute("aria-sort", state === "ascending" ? "descending" : "ascending");
      body.append(...[...original].sort(order(place, state === "ascending")));
    });
  });
  if (original.length > 12) {
    const label = document.createElement("label");
    const input = document.createElement("input");
    const shown = document.createElement("output");
    label.className = "filter";
    input.type = "search";
    label.append("Show only rows with ", input, " ", shown);
    input.addEventListener("input", () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      let left = 0;
      for (const row of original) {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every(word => text.includes(word));
        left += !row.hidden;
      }
      shown.textContent = words.length ? `${left} of ${original.length}` : "";
    });
    table.closest(".scroll").before(label);
  }
}
const reveal = () => {
  const target = document.getElementById(location.hash.slice(1));
  if (target instanceof HTMLDetailsElement) target.open = true;
};
addEventListener("hashchange", reveal);
reveal();
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
