#!/bin/sh
# data.sh DIR: ten root file systems that overlap, two versions of Go's source, a PostgreSQL data directory and an archive, made of what
# this machine has. It needs mkfs.ext4; PostgreSQL's part is left out where there is no initdb.
set -eu
d=${1:?usage: data.sh DIR}
mkdir -p "$d/root"
cp -a /usr/bin /etc "$d/root/"
mkdir -p "$d/root/share"
cp -a /usr/share/doc /usr/share/perl* /usr/share/locale /usr/share/zoneinfo "$d/root/share/" 2>/dev/null || true
image() { # tree image
	rm -f "$2"
	truncate -s "$(( $(du -sm "$1" | cut -f1) * 5 / 4 + 64 ))M" "$2"
	mkfs.ext4 -q -d "$1" "$2"
}
# Each differs from the one before: some programs gone, some files changed, a log of its own.
for i in 1 2 3 4 5 6 7 8 9 10; do
	image "$d/root" "$d/root$i.img"
	find "$d/root/bin" -type f | sort | awk "NR%97==$i" | xargs rm -f
	for f in $(find "$d/root/etc" -type f | sort | awk "NR%13==$i"); do echo "# host $i" >> "$f"; done
	mkdir -p "$d/root/var/log"
	seq $((i * 100000)) $((i * 100000 + 60000)) | sed "s/^/host$i app[$i]: request /" > "$d/root/var/log/messages"
done
rm -rf "$d/root"
go=$(go env GOROOT)
image "$go/src" "$d/go1.img"
(cd / && go mod download golang.org/toolchain@v0.0.1-go1.25.0.linux-amd64) || true # the second version; 200 MB in the module cache
old=$(ls -d "$(go env GOMODCACHE)"/golang.org/toolchain*/src 2>/dev/null | head -1 || true)
[ -z "$old" ] || image "$old" "$d/go2.img"
tar -C "$go" -czf "$d/go.tar.gz" src
if command -v initdb >/dev/null; then
	chmod 755 "$d"
	mkdir -p "$d/pg"
	chown nobody "$d/pg"
	as="setpriv --reuid=nobody --clear-groups"
	(cd /tmp && $as initdb -D "$d/pg/data" -U x >/dev/null &&
		$as pg_ctl -s -w -D "$d/pg/data" -o "-c listen_addresses='' -k $d/pg" start &&
		pgbench -q -h "$d/pg" -U x -i -s 12 postgres >/dev/null 2>&1
		pgbench -h "$d/pg" -U x -T 20 postgres >/dev/null 2>&1 || true
		$as pg_ctl -s -m fast -D "$d/pg/data" stop)
	image "$d/pg/data" "$d/pg.img"
fi
