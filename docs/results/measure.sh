#!/usr/bin/env bash
# Measures all tables of README and docs on the machine at hand, one after the other:
#   docs/results/measure.sh FOLDER [--FLAG=VALUE ...]
# Flags are added to each command: --repeat=1 --builds=1 tries it out. PYTHON is the python
# of an environment that has hk_stack[compare]. FOLDER/all has the report of all, and
# results.json with the device's name. On a GPU, single precision is single precision.
set -euo pipefail
folder=$1
shift
extra=("$@")
export JAX_DEFAULT_MATMUL_PRECISION=${JAX_DEFAULT_MATMUL_PRECISION:-highest}

measure() { # NAME, then flags
  echo "== $1"
  # A way that fails is in the file, with its error.
  "${PYTHON:-python}" -m hk_stack.compare --out="$folder/$1" "${@:2}" "${extra[@]}" || [ $? = 1 ]
}

measure depth --layers=4,16,64 --repeat=8 --builds=2 --patience=5
measure s4 --model=s4,s4_terms --mode=setup,accumulate --length=512 --builds=5
measure runs --model=s4 --mode=fwd,grad,decode,generate --layers=8 --length=512 --builds=5
measure recurrence --model=recurrence --mode=fwd,grad,setup --layers=16 --length=1024 --batch=1 --builds=5
measure init --model=s4,transformer,shapes --mode=init --layers=48 --length=64 --batch=1 --width=256 --frameworks=haiku,hk_stack
measure thousands --model=transformer,s4 --mode=init,grad --layers=10,1000,4000 --length=16 --batch=1 --width=16 --frameworks=hk_stack --repeat=4 --builds=4
# On a CPU there are eight devices then.
XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=8" measure shards --model=transformer --mode=init_sharded --layers=32 --length=8 --batch=1 --width=512 --repeat=2
measure remat --model=mlp,transformer --mode=remat,eager --layers=48 --length=256
measure port --model=transformer --mode=port --layers=24 --width=512
"${PYTHON:-python}" -m hk_stack.compare "$folder"/*/results.json --out="$folder/all"
