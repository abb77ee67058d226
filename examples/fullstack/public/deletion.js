// Deletes a task after a time in which the user can undo it. Until then the page says "Deleting",
// and the server has the task.
import { Abandoned, call, Refusal } from "./api.js";
import { copy, moveFocus } from "./elements.js";
import { announce } from "./messages.js";

const UNDO_SECONDS = 6;
const pending = new Set();

// Puts a line with "Undo" in the place of the row. Calls `kept(message)` if the task is not deleted
// after all, and `deleted()` otherwise.
export function deleteLater(task, row, { kept, deleted }) {
  const line = copy("deleted");
  const undo = line.querySelector(".undo");
  line.querySelector("p").textContent = `Deleting “${task.title}”…`;
  undo.setAttribute("aria-label", `Undo: ${task.title}`);

  let isSent = false;
  const end = () => {
    clearTimeout(timer);
    pending.delete(deletion);
  };
  const send = async () => {
    isSent = true;
    clearTimeout(timer);
    if (document.activeElement === undo) moveFocus(line);
    undo.hidden = true;
    try {
      await remove(task);
    } catch (error) {
      if (error instanceof Abandoned) return false;
      if (!(error instanceof Refusal)) throw error;
      kept(error.message);
      return false;
    } finally {
      end();
    }
    if (line.contains(document.activeElement)) moveFocus(line);
    deleted();
    announce(`Deleted “${task.title}”.`);
    return true;
  };
  // Who uses the keyboard needs no haste: the time does not end while the focus is on the button.
  const timer = setTimeout(() => {
    if (undo.matches(":focus-visible")) undo.addEventListener("blur", deletion.send, { once: true });
    else deletion.send();
  }, UNDO_SECONDS * 1000);
  let sending;
  const deletion = { send: () => (sending ??= send()), end };
  pending.add(deletion);
  undo.addEventListener("click", () => {
    if (isSent || !pending.has(deletion)) return;
    end();
    kept("");
    announce(`“${task.title}” is kept.`);
  });

  row.replaceWith(line);
  undo.focus();
  announce(`Deleting “${task.title}”. You can undo this for ${UNDO_SECONDS} seconds.`);
  return line;
}

async function remove(task) {
  try {
    // The request goes on when the page is closed.
    await call("DELETE", `/api/tasks/${task.id}`, undefined, { keepalive: true });
  } catch (error) {
    // Deleted elsewhere.
    if (error.status !== 404) throw error;
  }
}

// Sends what is pending; returns whether everything is deleted.
export async function settle() {
  const results = await Promise.all([...pending].map(({ send }) => send()));
  return results.every(Boolean);
}

export function forgetDeletions() {
  for (const { end } of pending) end();
}

addEventListener("pagehide", settle);
