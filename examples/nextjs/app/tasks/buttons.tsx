"use client";

import { createAuthClient } from "better-auth/react";
import { useRouter } from "next/navigation";

const auth = createAuthClient();

export type Task = { id: number; title: string; completed: boolean };

export function Done({ task }: { task: Task }) {
  const router = useRouter();

  async function finish() {
    const path = `/api/tasks/${task.id}`;
    const version = (await fetch(path)).headers.get("ETag");
    const answer = await fetch(path, {
      method: "PATCH",
      headers: { "Content-Type": "application/json", "If-Match": version ?? "" },
      body: JSON.stringify({ completed: true }),
    });
    if (!answer.ok) alert(`The server answered ${answer.status}.`);
    router.refresh();
  }

  return task.completed ? "✓" : <button onClick={finish}>Done</button>;
}

export function SignOut() {
  async function signOut() {
    await auth.signOut();
    // Not router.push: the browser's memory would keep the tasks of this user.
    location.assign("/");
  }

  return <button onClick={signOut}>Sign out</button>;
}
