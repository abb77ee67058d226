// Signing up, in and out, and deleting the account.
import { abandonRequests, call } from "./api.js";
import { clearAddress, readAddress } from "./address.js";
import { forgetDeletions, settle } from "./deletion.js";
import { attempt, onClick, onSignedOut, onSubmit } from "./forms.js";
import { forgetList, reload } from "./list.js";
import { $, announce, notice, tell } from "./messages.js";

const door = $("door-form");
let isSigningUp = false;

function setDoor(signingUp) {
  isSigningUp = signingUp;
  $("door-title").textContent = $("door-submit").textContent = signingUp ? "Sign up" : "Sign in";
  $("door-question").textContent = signingUp ? "Have an account?" : "No account yet?";
  $("door-switch").textContent = signingUp ? "Sign in" : "Create one";
  $("name-field").hidden = door.elements.name.disabled = !signingUp;
  $("password-hint").hidden = !signingUp;
  door.elements.password.autocomplete = signingUp ? "new-password" : "current-password";
}

function showOnly(section) {
  for (const id of ["opening", "failure", "door", "tasks"]) $(id).hidden = id !== section;
  $("who").hidden = section !== "tasks";
}

// Removes all data of the last user from the page.
function showDoor(message = "") {
  abandonRequests();
  forgetDeletions();
  forgetList();
  notice("");
  announce("");
  $("name").textContent = $("name").title = "";
  for (const form of document.forms) form.reset();
  for (const alert of document.querySelectorAll("[role=alert]")) tell("", alert);
  for (const dialog of document.querySelectorAll("dialog")) dialog.close();
  setDoor(false);
  showOnly("door");
  tell(message, $("alert"));
  door.elements.email.focus();
}

async function showTasks() {
  const { said: user } = await call("GET", "/api/me");
  $("name").textContent = user.name || user.email;
  $("name").title = $("leave-form").elements.email.value = user.email;
  door.reset();
  tell("", $("alert"));
  showOnly("tasks");
  readAddress();
  $("add-form").elements.title.focus();
  await reload();
}

async function open() {
  $("opening").hidden = false;
  try {
    // Better Auth extends a session only on this request.
    const { said: session } = await call("GET", "/api/auth/get-session");
    if (session === null) showDoor();
    else await showTasks();
  } catch (error) {
    $("opening").hidden = true;
    $("failure").hidden = false;
    throw error;
  }
}

function startDialog(dialog) {
  dialog.querySelector(".cancel").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => {
    for (const alert of dialog.querySelectorAll("[role=alert]")) tell("", alert);
    for (const field of dialog.querySelectorAll("[type=password]")) field.value = "";
  });
}

export function startSession() {
  onSignedOut(() => showDoor("You are signed out. Please sign in again."));
  onSubmit(
    door,
    async (fields) => {
      await call("POST", `/api/auth/sign-${isSigningUp ? "up" : "in"}/email`, fields);
      await showTasks();
    },
    $("door-alert"),
  );
  $("door-switch").addEventListener("click", () => {
    tell("", $("door-alert"));
    setDoor(!isSigningUp);
    door.elements[isSigningUp ? "name" : "email"].focus();
  });
  onClick(
    $("sign-out"),
    async () => {
      // If a task could not be deleted, the user has to see it.
      if (!(await settle())) return;
      await call("POST", "/api/auth/sign-out", {});
      clearAddress();
      showDoor();
    },
    $("alert"),
  );
  for (const dialog of document.querySelectorAll("dialog")) startDialog(dialog);
  $("leave").addEventListener("click", () => $("leave-dialog").showModal());
  onSubmit(
    $("leave-form"),
    async ({ password }) => {
      await call("POST", "/api/auth/delete-user", { password });
      clearAddress();
      showDoor("Your account is deleted, and everything in it.");
    },
    $("leave-alert"),
  );
  onClick($("again"), open, $("failure-alert"));
  attempt([$("again")], open, $("failure-alert"));
}
