#!/bin/sh
# Unpack Debian's Slurm into a folder, without being root: tests/launch/slurm_here.sh FOLDER; then LONGSPAN_SLURM=FOLDER make test
set -eu
mkdir -p "$1/debs" "$1/root"
cd "$1/debs"
apt-get download -q slurmctld slurmd slurm-client slurm-wlm-basic-plugins libmunge2 libhwloc15 libjson-c5 liblua5.1-0 \
    liblz4-1 libnuma1 libyaml-0-2 libdbus-1-3 libreadline8 libpam0g
for package in *.deb; do dpkg-deb -x "$package" ../root; done
