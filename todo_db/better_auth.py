"""Authentication by Better Auth's cookies, session tokens and JWTs, and by JWTs of other issuers.

No request is sent to the Better Auth server. A session is looked up in the table `sessions`, and a
JWT is verified with a public key from the table `jwks`. `BETTER_AUTH_SECRET` only signs cookies, so
it cannot verify a JWT. Better Auth documents both formats:
https://www.better-auth.com/docs/concepts/session-management and …/plugins/jwt. With
`NEON_AUTH_BASE_URL` or `TODO_DB_JWKS_URL` the public keys are fetched from a URL.
"""

from todo_db.authenticator import Authenticator, Identity

__all__ = ["Authenticator", "Identity"]
