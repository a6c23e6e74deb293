#!/bin/sh
# Adds its words as a line to the file CALLS. Exits with FIRST for the half without Ray, and with SECOND for the other.
echo "$@" >> "$CALLS"
case "$*" in *"not cluster"*) exit "$FIRST" ;; *) exit "$SECOND" ;; esac
