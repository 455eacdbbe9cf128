// Tables that can be sorted, and commands that can be copied. Without it the page still says everything.
(() => {
  "use strict";
  const said = document.getElementById("said");
  const button = (text, label) => {
    const made = document.createElement("button");
    made.type = "button";
    made.append(text);
    if (label) made.setAttribute("aria-label", label);
    return made;
  };

  const key = (row, column) => {
    const cell = row.cells[column], data = cell.querySelector("data");
    if (data) return Number(data.value);
    const text = cell.textContent.trim();
    return text === "-" || text === "" ? null : text;
  };
  const compare = (a, b) =>
    typeof a === "number" && typeof b === "number"
      ? a - b
      : String(a).localeCompare(String(b), "en", { numeric: true });

  const sort = (table, header) => {
    const column = header.cellIndex, body = table.tBodies[0];
    const descending = header.getAttribute("aria-sort") === "ascending";
    for (const other of header.parentNode.cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const rows = Array.from(body.rows, (row) => [key(row, column), row]);
    rows.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null); // what is not known comes last
      return descending ? compare(b, a) : compare(a, b);
    });
    body.append(...rows.map(([, row]) => row));
    said.textContent = `sorted by ${header.textContent.trim()}, ${descending ? "descending" : "ascending"}`;
  };

  for (const table of document.querySelectorAll("table.sortable")) {
    for (const header of table.tHead.rows[0].cells) {
      if (header.classList.contains("no-sort") || !header.textContent.trim()) continue;
      const made = button("");
      made.className = "sort";
      made.append(...header.childNodes);
      header.append(made);
      made.addEventListener("click", () => sort(table, header));
    }
  }

  for (const command of document.querySelectorAll(".command")) {
    const code = command.querySelector("code"), made = button("copy", "copy the command");
    made.className = "quiet";
    command.append(made);
    made.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(code.textContent);
        made.textContent = "copied";
      } catch {
        getSelection().selectAllChildren(code); // to be copied by hand
        made.textContent = "selected";
      }
      said.textContent = `command ${made.textContent}`;
      setTimeout(() => (made.textContent = "copy"), 2000);
    });
  }
})();
