#!/usr/bin/env bash
# Holds the server to its own document: Schemathesis makes requests from /openapi.json and checks that the answers are as
# documented.
#
#     tests/schemathesis.sh [EXAMPLES]
#
# EXAMPLES: requests that are made up for each operation, besides some three thousand at the bounds of the fields
# [default: 8]. Starts a server with the small model of tests/models. Needs Python 3 with pip; installs into
# target/schemathesis.
set -euo pipefail
cd "$(dirname "$0")/.."
examples=${1:-8}
venv=$PWD/target/schemathesis
if [[ ! -x $venv/bin/schemathesis ]]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet 'schemathesis>=4,<5'
fi

folder=$(mktemp -d)
server=
trap '[[ -z $server ]] || kill "$server" 2>/dev/null || true; rm -rf "$folder"' EXIT
cat > "$folder/template.jinja" <<'TEMPLATE'
{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if tools %}<tool_call>{% endif %}
TEMPLATE
# A short context keeps answers short.
target/release/mxserve tests/models/rustdoc-6m --host 127.0.0.1 --port 0 --chat-template "$folder/template.jinja" \
    --kv-cache-memory-bytes 16777216 --max-model-len 64 --disable-log-requests > "$folder/out" 2> "$folder/log" &
server=$!
base=
for _ in $(seq 300); do
    base=$(grep -o 'http://[^/]*' "$folder/out" | head -1) && break
    kill -0 "$server" || { cat "$folder/log" >&2; exit 1; }
    sleep 0.1
done
[[ -n $base ]] || { echo "the server does not start" >&2; cat "$folder/log" >&2; exit 1; }

# A 4xx is right for some of what the document allows, as fields exclude each other. A 5xx, an undocumented status and a
# body that is not as documented never are.
cd "$folder"
timeout 600 "$venv/bin/schemathesis" run "$base/openapi.json" --workers 2 --max-examples "$examples" --seed 1 \
    --phases examples,coverage,fuzzing --request-timeout 30 --no-color --generation-deterministic \
    --checks not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,response_schema_conformance

kill -0 "$server" || { echo "the server ended" >&2; cat "$folder/log" >&2; exit 1; }
if grep -q panicked "$folder/log"; then
    cat "$folder/log" >&2
    exit 1
fi
