// Adds the tables and columns of two plugins, as an operator does with `auth migrate`.
import { getMigrations } from "better-auth/db/migration";
import { admin, twoFactor } from "better-auth/plugins";

import { options, pool } from "./auth.mjs";

const plugins = [...options.plugins, admin(), twoFactor()];
const { runMigrations } = await getMigrations({ ...options, plugins });
await runMigrations();
await pool.end();
