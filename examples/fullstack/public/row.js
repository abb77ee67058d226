// One task in the list.
import { call } from "./api.js";
import { deleteLater } from "./deletion.js";
import { editForm } from "./edit.js";
import { copy, moveFocus } from "./elements.js";
import { attempt, onClick } from "./forms.js";
import { announce, notice, tell } from "./messages.js";

// "More" is offered where a description is cut off, which depends on the width of the page.
const widths = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    const unfold = target.nextElementSibling;
    const isOpen = unfold.ariaExpanded === "true";
    unfold.hidden = !isOpen && target.scrollHeight <= target.clientHeight + 1;
  }
});

export class Row {
  #item = copy("task");
  #form = null;
  #line = null; // in its place while it is being deleted
  #removed;

  constructor(task, removed) {
    this.task = task;
    this.#removed = removed;
    const tick = this.#part("[type=checkbox]");
    const alert = this.#part(".row-alert");
    tick.addEventListener("change", () => {
      const completed = tick.checked;
      // The checkbox shows the new state only after the answer.
      tick.checked = this.task.completed;
      attempt([tick], () => this.#complete(completed), alert);
    });
    onClick(this.#part(".change"), () => this.#edit(), alert);
    this.#part(".delete").addEventListener("click", () => this.#delete());
    const unfold = this.#part(".unfold");
    unfold.addEventListener("click", () => this.#unfold(unfold.ariaExpanded !== "true"));
    widths.observe(this.#part(".description"));
    this.update(task);
  }

  // The element that represents the task now.
  get node() {
    return this.#line ?? this.#item;
  }

  // Whether a reload of the list would lose something.
  get isEditing() {
    return this.#form !== null;
  }

  get isGoing() {
    return this.#line !== null;
  }

  update(task) {
    this.task = task;
    const { title, description, completed } = task;
    this.#item.classList.toggle("done", completed);
    this.#part(".title").textContent = title;
    this.#part(".description").textContent = description ?? "";
    this.#part("[type=checkbox]").checked = completed;
    const labels = { "[type=checkbox]": "Done", ".change": "Edit", ".delete": "Delete" };
    for (const [selector, verb] of Object.entries({ ...labels, ".unfold": "More of" })) {
      this.#part(selector).setAttribute("aria-label", `${verb}: ${title}`);
    }
    this.#unfold(false);
  }

  focus(selector = "[type=checkbox]") {
    this.#part(selector).focus();
  }

  #part(selector) {
    return this.#item.querySelector(selector);
  }

  #unfold(isOpen) {
    const unfold = this.#part(".unfold");
    unfold.ariaExpanded = String(isOpen);
    unfold.textContent = isOpen ? "Less" : "More";
    unfold.setAttribute("aria-label", `${unfold.textContent} of: ${this.task.title}`);
    this.#part(".description").classList.toggle("open", isOpen);
  }

  // Another page may have deleted the task.
  async #ask(...request) {
    try {
      return await call(request[0], `/api/tasks/${this.task.id}`, ...request.slice(1));
    } catch (error) {
      if (error.status !== 404) throw error;
      this.#say();
      return null;
    }
  }

  async #complete(completed) {
    const answer = await this.#ask("PATCH", { completed });
    if (answer === null) return;
    this.update(answer.said);
    announce(`${completed ? "Done" : "Open again"}: ${answer.said.title}`);
  }

  // Loads the current texts and their ETag. If the task is changed elsewhere before this edit is
  // sent, the ETag no longer matches, and the edit is refused.
  async #edit() {
    const answer = await this.#ask("GET");
    if (answer === null) return;
    this.update(answer.said);
    this.#form = editForm(answer.said, answer.etag, (task) => this.#close(task));
    this.#part(".shown").hidden = true;
    this.#item.append(this.#form);
    this.#form.elements.title.focus();
  }

  #close(task) {
    if (task === null) {
      moveFocus(this.#item);
      this.#item.remove();
      this.#removed(this);
      return;
    }
    if (task !== undefined) this.update(task);
    this.#part(".shown").hidden = false;
    this.focus(".change");
    this.#form.remove();
    this.#form = null;
  }

  #delete() {
    tell("", this.#part(".row-alert"));
    this.#line = deleteLater(this.task, this.#item, {
      kept: (message) => {
        const line = this.#line;
        const isFocused = line.contains(document.activeElement);
        this.#line = null;
        if (line.isConnected) line.replaceWith(this.#item);
        else if (message !== "") notice(`“${this.task.title}” is not deleted. ${message}`);
        if (isFocused) this.focus(".delete");
        tell(message, this.#part(".row-alert"));
      },
      deleted: () => {
        this.#line.remove();
        this.#removed(this);
      },
    });
  }

  // Says in the place of the row that it is gone.
  #say() {
    const line = copy("gone");
    const close = line.querySelector(".close");
    close.addEventListener("click", () => {
      moveFocus(line);
      line.remove();
    });
    const isFocused = this.#item.contains(document.activeElement);
    this.#item.replaceWith(line);
    if (isFocused) close.focus();
    this.#removed(this);
  }
}
