// Migrates, as an operator would with `auth migrate`, what two plugins need beyond our schema.
import { getMigrations } from "better-auth/db/migration";
import { admin, twoFactor } from "better-auth/plugins";

import { options, pool } from "./auth.mjs";

const plugins = [...options.plugins, admin(), twoFactor()];
const { runMigrations } = await getMigrations({ ...options, plugins });
await runMigrations();
await pool.end();
