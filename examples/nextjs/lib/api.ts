import "server-only";

import { headers } from "next/headers";

/** Sends a request to FastAPI as the user who sent the request that is being answered. */
export async function api(path: string, init: RequestInit = {}) {
  const given = await headers();
  const sent = new Headers(init.headers);
  for (const name of ["cookie", "origin", "sec-fetch-site"]) {
    const value = given.get(name);
    if (value !== null) sent.set(name, value);
  }
  return fetch(`${process.env.TODO_API_URL}${path}`, { ...init, headers: sent, cache: "no-store" });
}
