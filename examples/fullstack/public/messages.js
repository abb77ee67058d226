// What the page says. User input is set only as text, never as HTML.
export const $ = (id) => document.getElementById(id);

// Shows an error next to what it is about, or removes it with an empty message.
export function tell(message, place) {
  place.textContent = message;
  place.hidden = message === "";
}

// For screen readers: a change that the page shows.
export function announce(message) {
  $("news").textContent = message;
}

let follow;

// For everybody: a change that the page does not show, and what can be done about it.
export function notice(message, label = "", action = undefined) {
  follow = action;
  $("notice-text").textContent = message;
  $("notice-action").textContent = label;
  $("notice-action").hidden = action === undefined;
  $("notice").hidden = message === "";
}

// The focus moves on first, because a hidden button would lose it.
function close() {
  $("add-form").elements.title.focus();
  notice("");
}

$("notice-close").addEventListener("click", close);
$("notice-action").addEventListener("click", () => {
  const action = follow;
  close();
  action();
});
