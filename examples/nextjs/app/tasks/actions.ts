"use server";

import { refresh } from "next/cache";

import { api } from "../../lib/api";

export async function add(form: FormData) {
  const answer = await api("/api/tasks", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ title: form.get("title") }),
  });
  if (!answer.ok) throw new Error(`FastAPI answered ${answer.status}`);
  refresh();
}
