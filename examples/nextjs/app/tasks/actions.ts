"use server";

import { redirect } from "next/navigation";

import { api } from "../../lib/api";

export async function add(form: FormData) {
  const answer = await api("/api/tasks", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ title: form.get("title") }),
  });
  if (!answer.ok) throw new Error(`FastAPI answered ${answer.status}`);
  // Not refresh(): before React has taken over the form, the answer would be an empty page.
  redirect("/tasks");
}
