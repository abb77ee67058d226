// The filter in the address of the page: a reload keeps it, and back and forward change it.
import { $ } from "./messages.js";

const form = $("filter-form");
const DEFAULTS = { search: "", completed: "", sort: "newest" };

// Returns what differs from the defaults, as the parameters of the API.
export function filter() {
  const fields = [...new FormData(form)];
  return new URLSearchParams(fields.filter(([name, value]) => value !== DEFAULTS[name]));
}

export function readAddress() {
  const given = new URLSearchParams(location.search);
  for (const [name, usual] of Object.entries(DEFAULTS)) {
    const field = form.elements[name];
    field.value = given.get(name) ?? usual;
    // A list has no such option.
    if (field.value === "" && usual !== "") field.value = usual;
  }
}

function write(query, { replace }) {
  const url = query.size > 0 ? `/?${query}` : "/";
  if (url === location.pathname + location.search) return false;
  history[replace ? "replaceState" : "pushState"](null, "", url);
  return true;
}

// The address also says what the last user searched for.
export function clearAddress() {
  write(new URLSearchParams(), { replace: true });
  readAddress();
}

export function clearFilter() {
  write(new URLSearchParams(), { replace: false });
  readAddress();
}

// Calls the function after each change of the filter. A word that is being typed is one entry in
// the history.
export function onFilter(work) {
  let timer;
  let isTyping = false;
  const apply = (event) => {
    const inSearch = event.target === form.elements.search;
    if (write(filter(), { replace: inSearch && isTyping })) work();
    isTyping = inSearch;
  };
  form.addEventListener("input", (event) => {
    clearTimeout(timer);
    if (event.target !== form.elements.search) apply(event);
    else timer = setTimeout(() => apply(event), 200);
  });
  form.elements.search.addEventListener("blur", () => (isTyping = false));
  form.addEventListener("submit", (event) => event.preventDefault());
  addEventListener("popstate", () => {
    clearTimeout(timer);
    isTyping = false;
    readAddress();
    work();
  });
}
