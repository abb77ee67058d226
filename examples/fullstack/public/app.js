// Shows a change only after the server has confirmed it. User input is set only as text, never as
// HTML.
const $ = (id) => document.getElementById(id);

class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function call(method, path, body, headers = {}) {
  let response, text;
  try {
    response = await fetch(path, {
      method,
      headers: body === undefined ? headers : { "content-type": "application/json", ...headers },
      body: body === undefined ? undefined : JSON.stringify(body),
    });
    text = await response.text();
  } catch {
    throw new Refusal(0, "The server cannot be reached. Please try again.");
  }
  let said;
  try {
    said = text === "" ? null : JSON.parse(text);
  } catch {
    throw new Refusal(response.status, "The server gave an answer that this page cannot read.");
  }
  if (response.ok) return { said, etag: response.headers.get("etag") };
  // FastAPI answers with problem details, Better Auth with a message.
  const reason = said?.detail ?? said?.message ?? said?.title;
  throw new Refusal(
    response.status,
    typeof reason === "string" && reason !== "" ? reason : `It did not work (${response.status}).`,
  );
}

function tell(message, place = $("alert")) {
  place.textContent = message;
  place.hidden = message === "";
}

// Runs the action of a click or a form, and disables its buttons until the answer arrives.
async function attempt(buttons, work, place = $("alert")) {
  if ([...buttons].some((button) => button.disabled)) return;
  tell("", place);
  const focused = document.activeElement;
  for (const button of buttons) button.disabled = true;
  try {
    await work();
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    if (error.status === 401 && !$("tasks").hidden && place === $("alert")) {
      showDoor();
      tell("You are signed out. Please sign in again.");
    } else {
      tell(error.message, place);
    }
  } finally {
    for (const button of buttons) button.disabled = false;
    // A disabled button has lost the keyboard focus.
    if (document.activeElement === document.body) focused?.focus();
  }
}

function onSubmit(form, work, place) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const fields = Object.fromEntries(new FormData(form));
    attempt(form.querySelectorAll("button"), () => work(fields), place);
  });
}

function onClick(button, work) {
  button.addEventListener("click", () => attempt([button], work));
}

// ── Signing in and out ──

let isSigningUp = false;

function setDoor(signingUp) {
  isSigningUp = signingUp;
  const form = $("door-form");
  $("door-title").textContent = $("door-submit").textContent = signingUp ? "Sign up" : "Sign in";
  $("door-question").textContent = signingUp ? "Have an account?" : "No account yet?";
  $("door-switch").textContent = signingUp ? "Sign in" : "Create one";
  $("name-field").hidden = form.elements.name.disabled = !signingUp;
  form.elements.password.autocomplete = signingUp ? "new-password" : "current-password";
}

// Removes all data of the last user from the page.
function showDoor() {
  newest = null;
  pending = null;
  $("tasks").hidden = $("who").hidden = true;
  $("name").textContent = $("count").textContent = "";
  $("list").replaceChildren();
  for (const form of document.forms) form.reset();
  $("leave-dialog").close();
  setDoor(false);
  $("door").hidden = false;
}

async function showTasks() {
  const { said: user } = await call("GET", "/api/me");
  $("name").textContent = user.name || user.email;
  $("name").title = $("leave-form").elements.email.value = user.email;
  $("door").hidden = true;
  $("door-form").reset();
  $("tasks").hidden = $("who").hidden = false;
  await load();
}

onSubmit($("door-form"), async (fields) => {
  await call("POST", `/api/auth/sign-${isSigningUp ? "up" : "in"}/email`, fields);
  await showTasks();
  $("add-form").elements.title.focus();
});

$("door-switch").addEventListener("click", () => {
  tell("");
  setDoor(!isSigningUp);
  $("door-form").elements[isSigningUp ? "name" : "email"].focus();
});

onClick($("sign-out"), async () => {
  await call("POST", "/api/auth/sign-out", {});
  showDoor();
});

$("leave").addEventListener("click", () => {
  tell("", $("leave-alert"));
  $("leave-form").elements.password.value = "";
  $("leave-dialog").showModal();
});

$("leave-cancel").addEventListener("click", () => $("leave-dialog").close());

onSubmit(
  $("leave-form"),
  async ({ password }) => {
    await call("POST", "/api/auth/delete-user", { password });
    showDoor();
    tell("Your account is deleted, and everything in it.");
  },
  $("leave-alert"),
);

// ── The list ──

let newest = null; // the last request for a list: the answer to an older one is ignored
let cursor = null; // of the next page

async function load(after = null) {
  const filter = new FormData($("filter-form"));
  const query = new URLSearchParams({ limit: "20" });
  for (const [name, value] of filter) if (value !== "") query.set(name, value);
  if (after !== null) query.set("cursor", after);
  const mine = (newest = Symbol("request"));
  const { said: page } = await call("GET", `/api/tasks?${query}`);
  if (mine !== newest) return;
  const items = page.items.map(item);
  if (after === null) $("list").replaceChildren(...items);
  else $("list").append(...items);
  cursor = page.next_cursor;
  $("more").hidden = cursor === null;
  count();
}

function count() {
  const shown = $("list").children.length;
  const more = $("more").hidden ? "" : ", and there are more";
  $("count").textContent =
    shown > 0 ? `${shown} ${shown === 1 ? "task" : "tasks"}${more}` : "Nothing to show.";
}

function item(task) {
  const row = $("task").content.firstElementChild.cloneNode(true);
  const part = (selector) => row.querySelector(selector);
  const [tick, form] = [part("[type=checkbox]"), part("form")];
  const path = `/api/tasks/${task.id}`;
  row.classList.toggle("done", task.completed);
  part(".title").textContent = task.title;
  part(".description").textContent = task.description ?? "";
  tick.checked = task.completed;
  tick.setAttribute("aria-label", `Done: ${task.title}`);
  part(".change").setAttribute("aria-label", `Edit: ${task.title}`);
  part(".delete").setAttribute("aria-label", `Delete: ${task.title}`);

  // Another page may have deleted it.
  const ask = async (method, body, headers) => {
    try {
      return await call(method, path, body, headers);
    } catch (error) {
      if (error.status !== 404) throw error;
      drop(row);
      throw new Refusal(404, "This task is gone: it was deleted elsewhere.");
    }
  };

  tick.addEventListener("change", () => {
    const completed = tick.checked;
    // The checkbox shows the new state only after the answer.
    tick.checked = task.completed;
    attempt([tick], async () => {
      const { said } = await ask("PATCH", { completed });
      show(row, said, "[type=checkbox]");
    });
  });

  // Load the current title and its ETag. If the task is changed elsewhere before this edit is sent,
  // the ETag no longer matches, and the edit is refused.
  let version;
  onClick(part(".change"), async () => {
    const { said, etag } = await ask("GET");
    version = etag;
    form.elements.title.value = said.title;
    for (const name of [".title", ".change", ".delete"]) part(name).hidden = true;
    form.hidden = false;
    form.elements.title.focus();
  });
  onSubmit(form, async ({ title }) => {
    try {
      const { said } = await ask("PATCH", { title }, { "if-match": version });
      show(row, said, ".change");
    } catch (error) {
      if (error.status !== 412) throw error;
      const { said } = await ask("GET");
      show(row, said, ".change");
      throw new Refusal(412, "The task was changed elsewhere. This is its current state.");
    }
  });
  part(".cancel").addEventListener("click", () => show(row, task, ".change"));

  onClick(part(".delete"), async () => {
    await ask("DELETE");
    drop(row);
  });
  return row;
}

// Replaces the shown task with its current state.
function show(row, task, focused) {
  const next = item(task);
  row.replaceWith(next);
  next.querySelector(focused).focus();
}

function drop(row) {
  const neighbour = row.nextElementSibling ?? row.previousElementSibling;
  row.remove();
  count();
  (neighbour?.querySelector(".delete") ?? $("add-form").elements.title).focus();
}

// The same task sent again after an error keeps its key, so that it is stored once.
let pending = null;

onSubmit($("add-form"), async ({ title, description }) => {
  const task = { title, description: description === "" ? null : description };
  const same = pending?.title === task.title && pending.description === task.description;
  pending = same ? pending : { ...task, key: crypto.randomUUID() };
  await call("POST", "/api/tasks", task, { "idempotency-key": pending.key });
  pending = null;
  $("add-form").reset();
  $("add-form").elements.title.focus();
  await load();
});

let typing;
$("filter-form").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(() => attempt([], () => load()), 200);
});
$("filter-form").addEventListener("submit", (event) => event.preventDefault());

onClick($("more"), () => load(cursor));

onClick($("clear"), async () => {
  await call("DELETE", "/api/tasks?completed=true");
  await load();
});

// ── Start ──

attempt([], async () => {
  try {
    // Better Auth extends a session only on this request.
    const { said: session } = await call("GET", "/api/auth/get-session");
    if (session === null) showDoor();
    else await showTasks();
  } catch (error) {
    showDoor();
    throw error;
  }
});
