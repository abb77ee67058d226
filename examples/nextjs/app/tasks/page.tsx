import { redirect } from "next/navigation";
import { Suspense } from "react";

import { api } from "../../lib/api";
import { add } from "./actions";
import { type Task, Done, SignOut } from "./buttons";

async function List() {
  const answer = await api("/api/tasks");
  if (answer.status === 401) redirect("/");
  if (!answer.ok) throw new Error(`FastAPI answered ${answer.status}`);
  const { items }: { items: Task[] } = await answer.json();
  return (
    <ul>
      {items.map((task) => (
        <li key={task.id}>
          {task.title} <Done task={task} />
        </li>
      ))}
    </ul>
  );
}

export default function Page() {
  return (
    <main>
      <form action={add}>
        <input name="title" aria-label="New task" required />
        <button>Add</button>
      </form>
      <Suspense fallback={<p>Loading</p>}>
        <List />
      </Suspense>
      <SignOut />
    </main>
  );
}
