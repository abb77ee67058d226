// Runs Better Auth with options that the test gives as JSON in the variable FORM.
import { createServer } from "node:http";

import { betterAuth } from "better-auth";
import { toNodeHandler } from "better-auth/node";
import { jwt } from "better-auth/plugins";

import { options, pool } from "./auth.mjs";

const { jwks, ...form } = JSON.parse(process.env.FORM);
const [tokens, ...plugins] = options.plugins;
const auth = betterAuth({
  ...options,
  ...form,
  plugins: [jwt({ ...tokens.options, jwks }), ...plugins],
});
const server = createServer(toNodeHandler(auth));
server.listen(Number(process.env.PORT), "127.0.0.1", () => console.log("Listening on its port"));
process.on("SIGTERM", () => {
  server.close(() => pool.end());
  server.closeAllConnections();
});
