// Replaces auth.mjs for versions before 1.7, whose username plugin needs a second column.
import { betterAuth } from "better-auth";

import { options as newest, pool } from "./auth-of-new.mjs";

export const options = {
  ...newest,
  plugins: newest.plugins.filter(({ id }) => id !== "username"),
};
export const auth = betterAuth(options);
export { pool };
