#!/usr/bin/env bash
# A consortium of three hospitals on one machine: three folders, real processes, mTLS, masked sums, heart-disease records.
# docs/pilot.md does the same by hand on four machines. Needs: pip install -c constraints.txt '.[nvflare]', and PRIVFED_DATA naming the
# folder that has heart_disease/ (privfed data describe heart-disease says where to get it).
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
work="$(mkdir -p "${1:-pilot}" && cd "${1:-pilot}" && pwd)"
experiment="${2:-$here/../heart_pilot.toml}"
port="${PORT:-8102}"
privfed="${PYTHON:-python3} -m privfed"
: "${PRIVFED_DATA:?set it to the folder that has heart_disease/}"
trap 'kill $(jobs -p) 2>/dev/null; wait 2>/dev/null || true' EXIT
say() { printf '\n== %s (%s s)\n' "$1" "$SECONDS"; }
read_out() { "${PYTHON:-python3}" -c 'import json, sys; print(json.load(sys.stdin)["fingerprint"])'; }

say "The coordinator founds the consortium and reads its fingerprint out to the hospitals"
authority="$($privfed consortium new "$work/coordinator" --experiment "$experiment" --name heart \
  --contact "coordinator@example.org" --port "$port" --json | read_out)"
echo "$authority"

say "Each hospital makes its keys, which never leave, and asks to take part"
declare -A data=([cleveland]=cleveland [hungary]=hungarian [switzerland]=switzerland) mark
for site in "${!data[@]}"; do
  $privfed consortium request "$work/$site" --consortium heart --name "$site" \
    --organisation "$site" --contact "it@$site.example.org" --json >"$work/$site.asked" & # four machines, in truth
done
wait
for site in "${!data[@]}"; do mark[$site]="$(read_out <"$work/$site.asked")"; done

say "The coordinator approves whom it knows, signs the list, and sends the kits"
for site in "${!data[@]}"; do
  $privfed consortium approve "$work/coordinator" "$work/$site/$site.request" --fingerprint "${mark[$site]}"
done
$privfed consortium roster "$work/coordinator"
for site in "${!data[@]}"; do
  $privfed consortium kit "$work/coordinator" "$site" --out "$work/$site.kit"
done

say "Each hospital sets itself up, reads what it agreed to, and starts"
for site in "${!data[@]}"; do
  $privfed site init "$work/$site" --kit "$work/$site.kit" --authority "$authority" \
    --data "$PRIVFED_DATA/heart_disease/processed.${data[$site]}.data" --policy "$here/policy.toml" \
    >"$work/$site.agreed" &
done
wait
cat "$work/hungary.agreed"
$privfed coordinator start "$work/coordinator" >"$work/server.out" 2>&1 &
for site in "${!data[@]}"; do
  $privfed site start "$work/$site" >"$work/$site.out" 2>&1 &
done

say "The coordinator looks whether all is well, and runs the experiment"
for _ in $(seq 60); do
  $privfed coordinator preflight "$work/coordinator" "$experiment" && break
  sleep 1
done
$privfed coordinator submit "$work/coordinator" "$experiment" --block 20 --json >"$work/summary.json"

say "What each hospital has spent"
for site in "${!data[@]}"; do
  $privfed site status "$work/$site"
done
say "done: $work/summary.json, and the model and report in $work/coordinator/runs"
