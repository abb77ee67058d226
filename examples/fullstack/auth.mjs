// Better Auth on the tables that todo_db's migrations create: every different name is mapped.
import { betterAuth } from "better-auth";
import { bearer, jwt, username } from "better-auth/plugins";
import pg from "pg";

export const pool = new pg.Pool({ connectionString: process.env.DATABASE_URL });
// A database that is suspended closes idle connections. Without a listener this error would be an
// uncaught exception, and end the process.
pool.on("error", (error) => console.error(`An idle connection was lost: ${error.message}`));

const timestamps = { createdAt: "created_at", updatedAt: "updated_at" };

export const options = {
  database: pool,
  // BETTER_AUTH_SECRET and BETTER_AUTH_URL are read from the environment.
  emailAndPassword: { enabled: true },
  user: {
    modelName: "users",
    fields: { emailVerified: "email_verified", ...timestamps },
    // This also deletes the user's tasks, sessions and accounts: ON DELETE CASCADE.
    deleteUser: { enabled: true },
  },
  session: {
    modelName: "sessions",
    fields: {
      userId: "user_id",
      expiresAt: "expires_at",
      ipAddress: "ip_address",
      userAgent: "user_agent",
      ...timestamps,
    },
  },
  account: {
    modelName: "accounts",
    fields: {
      userId: "user_id",
      accountId: "account_id",
      providerId: "provider_id",
      accessToken: "access_token",
      refreshToken: "refresh_token",
      idToken: "id_token",
      accessTokenExpiresAt: "access_token_expires_at",
      refreshTokenExpiresAt: "refresh_token_expires_at",
      ...timestamps,
    },
  },
  verification: {
    modelName: "verifications",
    fields: { expiresAt: "expires_at", ...timestamps },
  },
  // Only for a header that clients cannot write: server.mjs sets it to the address of the socket.
  advanced: { ipAddress: { ipAddressHeaders: ["x-forwarded-for"] } },
  plugins: [
    jwt({
      schema: {
        jwks: {
          fields: {
            publicKey: "public_key",
            privateKey: "private_key",
            createdAt: "created_at",
            expiresAt: "expires_at",
          },
        },
      },
    }),
    bearer(),
    username({ displayUsername: false }),
  ],
};

export const auth = betterAuth(options);
