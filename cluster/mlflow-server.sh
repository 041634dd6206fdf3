#!/bin/sh
# MLflow's server with users, on PostgreSQL, with artifacts in a bucket that only the server touches. From the environment:
# DATABASE_HOST, DATABASE_PASSWORD, ARTIFACTS (s3://...), ALLOWED_HOSTS, MLFLOW_TRACKING_USERNAME and _PASSWORD (the first
# user), MLFLOW_FLASK_SERVER_SECRET_KEY; HOST, 0.0.0.0 where other machines are to reach it (127.0.0.1).
set -eu
settings="${TMPDIR:-/tmp}/mlflow-auth.ini"
umask 077
cat > "$settings" <<END
[mlflow]
default_permission = READ
database_uri = sqlite:///${TMPDIR:-/tmp}/mlflow-users.db
admin_username = ${MLFLOW_TRACKING_USERNAME:?}
admin_password = ${MLFLOW_TRACKING_PASSWORD:?}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
END
export MLFLOW_AUTH_CONFIG_PATH="$settings"
# Not as an argument, which every process on the machine could read.
export MLFLOW_BACKEND_STORE_URI="postgresql+psycopg2://${DATABASE_USER:-mlflow}:${DATABASE_PASSWORD:?}@${DATABASE_HOST:?}/${DATABASE_NAME:-mlflow}"
exec mlflow server --host "${HOST:-127.0.0.1}" --port "${PORT:-5000}" --workers "${WORKERS:-2}" --app-name basic-auth \
    --artifacts-destination "${ARTIFACTS:?}" --allowed-hosts "${ALLOWED_HOSTS:?}"
