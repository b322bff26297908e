/* Tables are sorted by a click on the head of a column: up, down, and as they were. */
document.addEventListener("DOMContentLoaded", () => {
  const UNITS = { KiB: 2 ** 10, MiB: 2 ** 20, GiB: 2 ** 30 };

  function valueOf(cell) {
    const text = cell ? cell.textContent.trim() : "";
    const number = text.match(/^-?[\d,]*\.?\d+(e[-+]?\d+)?/i);
    if (!number) return text.toLowerCase();
    const unit = text.slice(number[0].length).trim().split(/\s/)[0];
    return parseFloat(number[0].replaceAll(",", "")) * (UNITS[unit] || 1);
  }

  function compare(a, b, way) {
    const empty = (a === "") - (b === "");
    if (empty) return empty; // empty cells stay at the end
    if (typeof a === "number" && typeof b === "number") return way * (a - b);
    return way * String(a).localeCompare(String(b));
  }

  for (const table of document.querySelectorAll("article table")) {
    const body = table.tBodies[0];
    if (!table.tHead || !body || body.rows.length < 8) continue;
    const before = [...body.rows];
    const heads = [...table.tHead.rows[0].cells];
    table.classList.add("sortable");
    heads.forEach((head, column) => {
      const sort = () => {
        const next = { none: "ascending", ascending: "descending", descending: "none" }[head.ariaSort || "none"];
        heads.forEach((other) => (other.ariaSort = "none"));
        head.ariaSort = next;
        const way = next === "ascending" ? 1 : -1;
        const rows = [...before];
        if (next !== "none") {
          rows.sort((a, b) => compare(valueOf(a.cells[column]), valueOf(b.cells[column]), way));
        }
        body.append(...rows);
      };
      head.ariaSort = "none";
      head.tabIndex = 0;
      head.title = "Sort by this column";
      head.addEventListener("click", sort);
      head.addEventListener("keydown", (event) => {
        if (event.key === "Enter" || event.key === " ") {
          event.preventDefault();
          sort();
        }
      });
    });
  }
});
