// Finds and copies elements of the page.
import { $ } from "./messages.js";

// Returns a copy of the template's only element.
export function copy(template) {
  return $(template).content.firstElementChild.cloneNode(true);
}

// Moves the focus from an item of the list, which is about to go, to its neighbour.
export function moveFocus(item) {
  for (const neighbour of [item.nextElementSibling, item.previousElementSibling]) {
    const buttons = neighbour?.querySelectorAll(".delete, .undo, .close, .cancel") ?? [];
    const visible = [...buttons].find((button) => button.checkVisibility());
    if (visible !== undefined) return visible.focus();
  }
  $("add-form").elements.title.focus();
}
