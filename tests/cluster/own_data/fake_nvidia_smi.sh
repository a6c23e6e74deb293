#!/bin/sh
# Lists the memory of two GPUs in MiB, or that of the second one if `--id` selects it.
for word in "$@"; do
  case "$word" in --id=*) echo 24576; exit;; esac
done
printf '81920\n24576\n'
