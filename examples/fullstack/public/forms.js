// Runs the actions of buttons and forms, one at a time.
import { Abandoned, Refusal } from "./api.js";
import { tell } from "./messages.js";

let signedOut;

// Sets what happens when the server no longer knows the user.
export function onSignedOut(work) {
  signedOut = work;
}

// Runs the action, and shows its error at the place. Its buttons are marked as disabled until the
// answer arrives; a disabled button would lose the keyboard focus.
export async function attempt(buttons, work, place) {
  const all = [...buttons];
  if (all.some((button) => button.ariaDisabled === "true")) return;
  tell("", place);
  for (const button of all) button.ariaDisabled = "true";
  try {
    await work();
  } catch (error) {
    if (error instanceof Abandoned) return;
    if (!(error instanceof Refusal)) throw error;
    if (error.status === 401 && !place.closest("#door, #leave-dialog")) signedOut();
    else tell(error.message, place);
  } finally {
    for (const button of all) button.ariaDisabled = null;
  }
}

export function onSubmit(form, work, place) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    attempt(form.querySelectorAll("button"), () => work(Object.fromEntries(new FormData(form))), place);
  });
}

export function onClick(button, work, place) {
  button.addEventListener("click", () => attempt([button], work, place));
}
