// Prints what Better Auth's own migrator would do to the database.
import { options, pool } from "./auth.mjs";

// Older versions export it from another module.
const { getMigrations } = await import("better-auth/db/migration").catch(
  () => import("better-auth/db"),
);
const plan = await getMigrations(options);
const columns = (changes) =>
  changes.flatMap(({ table, fields }) => Object.keys(fields).map((field) => `${table}.${field}`));
console.log(
  JSON.stringify({
    created: columns(plan.toBeCreated),
    added: columns(plan.toBeAdded),
    indexes: (plan.toBeAddedIndexes ?? []).map(({ name }) => name),
    problems: [...(plan.unsafeChanges ?? []), ...(plan.schemaProblems ?? [])],
  }),
);
await pool.end();
