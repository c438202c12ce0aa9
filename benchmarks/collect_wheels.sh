#!/usr/bin/env bash
# Fills .whl/ with what a GPU machine without network lacks, which has torch 2.11, transformers 5.17, triton, accelerate,
# peft, safetensors, matplotlib and pytest for Python 3.12. For gpu_check.sh; run it once, in the root of a checkout, with
# gpu_check.sh beside this script; ten seconds, 7.4 MB:
#   bash collect_wheels.sh            # or: bash collect_wheels.sh FOLDER   (default .whl)
# .whl/ is kept out of git by .git/info/exclude.
set -euo pipefail
whl=${1:-.whl}
git rev-parse --git-dir >/dev/null 2>&1 && { grep -qxF /.whl/ .git/info/exclude 2>/dev/null || echo /.whl/ >>.git/info/exclude; }
py=${PYTHON:-python3}; command -v "$py" >/dev/null
mkdir -p "$whl"; rm -f "$whl"/*.whl

# name==version, no dependencies are followed: what is not here is on the machine
wheels=(
  math-verify==0.9.0 latex2sympy2_extended==1.11.0 antlr4-python3-runtime==4.13.2   # rewards: the judge
  bottle==0.13.4 waitress==3.0.2                                                    # ref_server.py
  hjson==3.1.0 pydantic==2.14.4 pydantic_core==2.50.5 annotated-types==0.8.0 typing-inspection typing-extensions  # deepspeed's
  trl==1.16.0 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19                     # benchmarks/compare.py, gpu.py
)
platforms=(); for n in 28 27 24 17 12 5; do platforms+=(--platform "manylinux_2_${n}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux2010_x86_64 --platform manylinux1_x86_64)
"$py" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" \
  -d "$whl" "${wheels[@]}"

# DeepSpeed is on the registry as source only. Nothing of it is compiled, so the wheel is for any Python.
temporary=$(mktemp -d); trap 'rm -rf "$temporary"' EXIT
DS_BUILD_OPS=0 DS_IGNORE_CUDA_DETECTION=1 "$py" -m pip wheel -q --no-deps --no-binary=deepspeed -w "$temporary" deepspeed==0.19.8
mv "$temporary"/deepspeed-0.19.8-py3-none-any.whl "$whl/"

test -f examples/arithmetic/model/config.json ||
  echo "no embedded model here: python examples/arithmetic.py makes it (take it along), or the GPU machine takes a minute for it"

test "$(ls "$whl"/*.whl | wc -l)" = $(( ${#wheels[@]} + 1 ))
ls -l "$whl" | awk 'NR > 1 { printf "%9d  %s\n", $5, $NF; sum += $5 } END { printf "%9d  in all (the limit of what travels is 67108864)\n", sum }'
