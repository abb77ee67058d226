// In the role of Next.js: serves the page, runs Better Auth, and forwards API requests to FastAPI.
// The browser sees one origin, so it sends its session cookie to both.
import { readdirSync, readFileSync } from "node:fs";
import { createServer, request as send } from "node:http";
import { extname } from "node:path";

import { toNodeHandler } from "better-auth/node";

import { auth, pool } from "./auth.mjs";

const api = new URL(process.env.TODO_API_URL);
const own = new URL(process.env.BETTER_AUTH_URL);
const port = Number(process.env.PORT ?? 3000);

const types = {
  ".css": "text/css",
  ".html": "text/html",
  ".js": "text/javascript",
  ".svg": "image/svg+xml",
};
const folder = new URL("public/", import.meta.url);
// Read once, so that a request cannot name any other file.
const pages = new Map(
  readdirSync(folder).map((name) => [
    name === "index.html" ? "/" : `/${name}`,
    { type: `${types[extname(name)]}; charset=utf-8`, body: readFileSync(new URL(name, folder)) },
  ]),
);
const headers = {
  "content-security-policy":
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; " +
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
  "cache-control": "no-cache",
  "cross-origin-opener-policy": "same-origin",
  "referrer-policy": "no-referrer",
  "x-content-type-options": "nosniff",
};

function problem(response, status, title, extra = {}) {
  response.writeHead(status, { "content-type": "application/problem+json", ...extra });
  response.end(JSON.stringify({ type: "about:blank", title, status }));
}

function forward(request, response) {
  const { connection: _, ...forwarded } = request.headers;
  const onward = send(
    {
      hostname: api.hostname,
      port: api.port,
      method: request.method,
      path: request.url,
      headers: forwarded,
      // A new connection for each request, because FastAPI may be closing an idle one.
      agent: false,
    },
    (answer) => {
      const { connection: _, ...given } = answer.headers;
      response.writeHead(answer.statusCode, given);
      answer.pipe(response);
      answer.on("error", () => response.destroy());
    },
  );
  onward.on("error", () => {
    if (response.headersSent) response.destroy();
    else problem(response, 503, "The API server does not answer", { "retry-after": "1" });
  });
  // The client may disconnect before the answer.
  response.on("close", () => onward.destroy());
  request.pipe(onward);
}

const handleAuth = toNodeHandler(auth);

const server = createServer((request, response) => {
  const [path] = request.url.split("?", 1);
  // Better Auth counts the attempts of an address. Clients can write this header, so replace it.
  request.headers["x-forwarded-for"] = request.socket.remoteAddress ?? "";
  if (path.startsWith("/api/auth/")) {
    handleAuth(request, response).catch((error) => {
      console.error(error);
      if (response.headersSent) response.destroy();
      else problem(response, 500, "Internal Server Error");
    });
  } else if (/^\/(health|api\/(me|tasks(\/.*)?))$/.test(path)) {
    // Browsers send a SameSite cookie from pages on every port of this host, so refuse other pages.
    if (["same-site", "cross-site"].includes(request.headers["sec-fetch-site"])) {
      problem(response, 403, "Not from this page");
    } else {
      forward(request, response);
    }
  } else if (path === "/" && request.headers.host !== own.host) {
    // With another host name, such as localhost, Better Auth would refuse every sign-in.
    response.writeHead(307, { location: new URL(request.url, own).href }).end();
  } else if (!pages.has(path)) {
    problem(response, 404, "Not Found");
  } else if (request.method !== "GET" && request.method !== "HEAD") {
    problem(response, 405, "Method Not Allowed", { allow: "GET, HEAD" });
  } else {
    const { type, body } = pages.get(path);
    response.writeHead(200, { ...headers, "content-type": type, "content-length": body.length });
    response.end(request.method === "HEAD" ? undefined : body);
  }
});

server.listen(port, "127.0.0.1", async () => {
  const { rows } = await pool.query("SELECT current_user AS login");
  console.log(`Listening on http://127.0.0.1:${server.address().port}, in PostgreSQL as ${rows[0].login}`);
});

process.on("SIGTERM", () => {
  server.close(() => pool.end());
  server.closeAllConnections();
});
