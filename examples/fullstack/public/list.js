// The list of tasks: its pages, its filter, and what is added to it.
import { call } from "./api.js";
import { clearFilter, filter, onFilter } from "./address.js";
import { attempt, onClick, onSubmit } from "./forms.js";
import { $, announce, notice } from "./messages.js";
import { Row } from "./row.js";

const PAGE = 20;
const LONGEST_PAGE = 100;

const rows = new Set();
const gone = new Set(); // ids: the answer to an older request may still contain them
let newest = null; // the last request for a list: the answer to an older one is ignored
let loading = Promise.resolve(); // until that request is answered
let cursor = null; // of the next page
let applied = new URLSearchParams(); // the filter of what is shown

const find = (id) => [...rows].find(({ task }) => task.id === id);

// Returns the rows of the tasks. A task that is shown already keeps its row, and so its edit.
function rowsOf(tasks) {
  return tasks
    .filter(({ id }) => !gone.has(id))
    .map((task) => {
      const known = find(task.id);
      if (known !== undefined) {
        known.update(task);
        return known;
      }
      const row = new Row(task, removed);
      rows.add(row);
      return row;
    });
}

function removed(row) {
  rows.delete(row);
  gone.add(row.task.id);
}

async function ask(query, work) {
  const mine = (newest = Symbol("request"));
  $("list-area").ariaBusy = "true";
  try {
    const { said } = await call("GET", `/api/tasks?${query}`);
    if (mine === newest) work(said);
  } catch (error) {
    if (mine === newest) throw error;
  } finally {
    if (mine === newest) $("list-area").ariaBusy = "false";
  }
}

async function load({ limit = PAGE } = {}) {
  const wanted = filter();
  const query = new URLSearchParams([...wanted, ["limit", limit]]);
  $("empty").hidden = true;
  $("list-waiting").hidden = $("list").children.length > 0 && !$("list").hidden;
  try {
    await ask(query, (page) => {
      applied = wanted;
      show(page);
    });
  } catch (error) {
    $("list-waiting").hidden = $("list").hidden = $("more").hidden = true;
    $("count").textContent = "";
    $("list-failure").hidden = false;
    throw error;
  }
}

export function reload(options) {
  loading = attempt([], () => load(options), $("list-alert"));
  return loading;
}

function show(page) {
  const loaded = rowsOf(page.items);
  const edited = [...rows].filter((row) => row.isEditing && !loaded.includes(row));
  if (document.activeElement === $("reload")) $("add-form").elements.title.focus();
  $("list-waiting").hidden = $("list-failure").hidden = true;
  $("list").hidden = false;
  $("list").replaceChildren(...[...edited, ...loaded].map(({ node }) => node));
  for (const row of rows) {
    if (!row.node.isConnected && !row.isGoing) rows.delete(row);
  }
  cursor = page.next_cursor;
  describe();
  announce(page.items.length === 0 ? $("empty-title").textContent : `Shown: ${summary()}.`);
}

async function loadMore() {
  const query = new URLSearchParams([...applied, ["limit", PAGE], ["cursor", cursor]]);
  await ask(query, (page) => {
    // A task that was added here, or moved by a change, may be shown already.
    const more = rowsOf(page.items).filter(({ node }) => !node.isConnected);
    $("list").append(...more.map(({ node }) => node));
    cursor = page.next_cursor;
    if (cursor === null && document.activeElement === $("more")) {
      // The button is about to go.
      if (more.length > 0) more[0].focus();
      else $("add-form").elements.title.focus();
    }
    describe();
    announce(`${more.length} more loaded.`);
  });
}

function summary() {
  const shown = $("list").querySelectorAll("li:not(.going)").length;
  return `${shown} ${shown === 1 ? "task" : "tasks"}`;
}

function describe() {
  const isEmpty = $("list").children.length === 0;
  const loaded = $("list-waiting").hidden && $("list-failure").hidden;
  $("more").hidden = cursor === null || !loaded;
  $("count").textContent =
    isEmpty || !loaded ? "" : `${summary()}${cursor === null ? "" : ", and there are more"}`;
  $("empty").hidden = !isEmpty || !loaded || cursor !== null;
  const isFiltered = applied.has("search") || applied.has("completed");
  $("show-all").hidden = !isFiltered;
  const [title, hint] = emptiness();
  $("empty-title").textContent = title;
  $("empty-hint").textContent = hint;
}

function emptiness() {
  if (applied.has("search")) {
    return [`No task contains “${applied.get("search")}”.`, "The search looks at titles and details."];
  }
  if (applied.get("completed") === "true") return ["Nothing is done yet.", "One step at a time."];
  if (applied.get("completed") === "false") return ["Nothing is open.", "All done. Enjoy the day."];
  return ["Nothing to do yet.", "Write your first task above. Only you can see it."];
}

// ── Adding ──

// The same task sent again after an error keeps its key, so that it is stored once.
let pending = null;

async function add({ title, description }) {
  const task = { title, description: description === "" ? null : description };
  const same = pending?.title === task.title && pending.description === task.description;
  pending = same ? pending : { ...task, key: crypto.randomUUID() };
  const headers = { "idempotency-key": pending.key };
  const { said } = await call("POST", "/api/tasks", task, { headers });
  pending = null;
  const fields = $("add-form").elements;
  // The user may be typing the next task.
  if (fields.title.value === title) fields.title.value = "";
  if (fields.description.value === description) fields.description.value = "";
  fields.title.focus();
  announce(`Added “${said.title}”.`);
  await place(said);
}

// A new task is the first one in whatever order, so that it is seen.
async function place(task) {
  // Another list may have been asked for meanwhile: its answer would replace this one.
  for (let awaited = null; awaited !== loading; ) await (awaited = loading);
  if (!$("list-failure").hidden) {
    await reload();
  } else if (matches(task)) {
    const [row] = rowsOf([task]);
    row.node.classList.add("fresh");
    $("list").prepend(row.node);
    notice("");
  } else {
    notice(`Added “${task.title}”. The filter hides it.`, "Show all tasks", showAll);
  }
}

function matches({ title, description, completed }) {
  const text = `${title}\n${description ?? ""}`.toLowerCase();
  const wanted = applied.get("completed") ?? String(completed);
  return text.includes((applied.get("search") ?? "").toLowerCase()) && wanted === String(completed);
}

function showAll() {
  clearFilter();
  return reload();
}

// ── Everything else ──

export function forgetList() {
  newest = cursor = pending = null;
  applied = new URLSearchParams();
  rows.clear();
  gone.clear();
  $("list").replaceChildren();
  $("list-area").ariaBusy = "false";
  $("list-failure").hidden = $("empty").hidden = true;
  describe();
  $("empty").hidden = true;
}

export function startList() {
  new MutationObserver(describe).observe($("list"), { childList: true });
  onSubmit($("add-form"), add, $("add-alert"));
  onFilter(() => {
    notice("");
    if (!$("tasks").hidden) reload();
  });
  onClick($("reload"), () => load(), $("list-alert"));
  onClick($("more"), loadMore, $("more-alert"));
  $("show-all").addEventListener("click", () => {
    $("add-form").elements.title.focus();
    showAll();
  });
  $("clear").addEventListener("click", () => $("clear-dialog").showModal());
  onSubmit(
    $("clear-form"),
    async () => {
      const { said } = await call("DELETE", "/api/tasks?completed=true");
      $("clear-dialog").close();
      await reload({ limit: Math.min(Math.max(rows.size, PAGE), LONGEST_PAGE) });
      announce(`Deleted ${said.deleted} ${said.deleted === 1 ? "task" : "tasks"}.`);
    },
    $("clear-alert"),
  );
  // The page comes back as it was left; its pending deletions were sent.
  addEventListener("pageshow", ({ persisted }) => {
    if (persisted && !$("tasks").hidden) reload();
  });
}
