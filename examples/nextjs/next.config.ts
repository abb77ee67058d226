import type { NextConfig } from "next";

const api = process.env.TODO_API_URL;

const config: NextConfig = {
  cacheComponents: true,
  partialPrefetching: true,
  rewrites: async () => [
    { source: "/api/me", destination: `${api}/api/me` },
    { source: "/api/tasks/:path*", destination: `${api}/api/tasks/:path*` },
  ],
};

export default config;
