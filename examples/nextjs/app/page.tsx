"use client";

import { createAuthClient } from "better-auth/react";
import { useState } from "react";

const auth = createAuthClient();

export default function SignIn() {
  const [problem, setProblem] = useState<string>();

  async function signIn(form: FormData) {
    const { error } = await auth.signIn.email({
      email: String(form.get("email")),
      password: String(form.get("password")),
    });
    if (error) setProblem(error.message);
    else location.assign("/tasks");
  }

  return (
    <form action={signIn}>
      <input name="email" type="email" aria-label="E-mail" autoComplete="username" />
      <input name="password" type="password" aria-label="Password" autoComplete="current-password" />
      <button>Sign in</button>
      <p role="alert">{problem}</p>
    </form>
  );
}
