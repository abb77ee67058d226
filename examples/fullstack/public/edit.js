// The form that changes the title and the description of a task.
import { call } from "./api.js";
import { copy } from "./elements.js";
import { onSubmit } from "./forms.js";
import { announce, tell } from "./messages.js";

// A text field has only \n as the end of a line, whatever was stored.
const texts = ({ title, description }) => ({
  title,
  description: (description ?? "").replace(/\r\n?/g, "\n"),
});
const areEqual = (one, other) =>
  one.title === other.title && one.description === other.description;

// Returns the form. It calls `closed(task)` with the state that was saved or seen last, `closed()`
// if nothing is known, and `closed(null)` if the task is gone.
export function editForm(task, etag, closed) {
  const form = copy("edit");
  const part = (selector) => form.querySelector(selector);
  const { title, description } = form.elements;
  const [alert, theirs, take, save] = [".edit-alert", ".theirs", ".take", ".save"].map(part);
  let isGone = false;
  let key; // of the new task, if this one is gone
  let [seen, version] = [task, etag];

  ({ title: title.value, description: description.value } = texts(task));
  const typed = () => ({ title: title.value, description: description.value });

  const finish = (current) => {
    closed(current);
    announce(`Saved “${current.title}”.`);
  };

  // Shows both versions, and keeps what the user has typed.
  const compare = () => {
    part(".their-title").textContent = seen.title;
    part(".their-description").textContent = seen.description ?? "";
    theirs.hidden = take.hidden = false;
    save.textContent = "Keep mine";
    tell(
      "This task was changed elsewhere. Your text is in the fields, the other version is below.",
      alert,
    );
  };

  const readAgain = async () => {
    const before = texts(seen);
    const { said, etag: current } = await call("GET", `/api/tasks/${task.id}`);
    [seen, version] = [said, current];
    const now = texts(said);
    // An answer that was lost: the server has stored this text.
    if (areEqual(now, typed())) finish(said);
    // Only the check mark has changed.
    else if (areEqual(now, before)) await change();
    else compare();
  };

  const change = async () => {
    const now = typed();
    const before = texts(seen);
    const body = {};
    if (now.title !== before.title) body.title = now.title;
    if (now.description !== before.description) body.description = now.description || null;
    if (Object.keys(body).length === 0) return closed(seen);
    try {
      const headers = { "if-match": version };
      finish((await call("PATCH", `/api/tasks/${task.id}`, body, { headers })).said);
    } catch (error) {
      if (error.status !== 412) throw error;
      await readAgain();
    }
  };

  const addAgain = async () => {
    const now = typed();
    const body = { ...now, description: now.description || null };
    if (key === undefined || !areEqual(now, key)) key = { ...now, value: crypto.randomUUID() };
    const headers = { "idempotency-key": key.value };
    finish((await call("POST", "/api/tasks", body, { headers })).said);
  };

  onSubmit(
    form,
    async () => {
      if (isGone) return addAgain();
      try {
        await change();
      } catch (error) {
        if (error.status !== 404) throw error;
        isGone = true;
        theirs.hidden = take.hidden = true;
        save.textContent = "Save as a new task";
        tell("This task is gone: it was deleted elsewhere. Your text is still here.", alert);
      }
    },
    alert,
  );
  const cancel = () => {
    if (part(".cancel").ariaDisabled !== "true") closed(isGone ? null : undefined);
  };
  part(".cancel").addEventListener("click", cancel);
  take.addEventListener("click", () => {
    if (take.ariaDisabled !== "true") closed(seen);
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !event.isComposing) cancel();
  });
  return form;
}
