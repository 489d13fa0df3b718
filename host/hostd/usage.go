package main

// example is a configuration with the fields that a site changes; the test holds that it is a good one.
const example = `{
  "name": "web1",
  "shelf": {"apis": ["http://10.1.0.10:8443", "http://10.1.0.11:8443"], "token": "API-TOKEN-OF-THE-SHELF"},
  "listen": "10.2.0.21:3260",
  "api": "/run/hostd.sock",
  "cache": {"path": "/dev/nvme1n1", "size": "400GiB"},
  "chap": [
    {"initiator": "iqn.1994-05.com.redhat:esx7", "volumes": ["vmfs1"], "user": "esx7", "secret_file": "/etc/ledge/esx7",
     "mutual_user": "ledge", "mutual_secret_file": "/etc/ledge/self"},
    {"user": "backup", "secret_file": "/etc/ledge/backup"}
  ],
  "snapshots": [{"name": "hourly", "volumes": ["vmfs1"], "every": "1h", "keep": 24}]
}
`

const usage = `hostd is Ledge's host agent: it joins a shelf and exports deduplicated, compressed, cached volumes over iSCSI.

Usage:
  hostd --config FILE [--check]

Options:
  --config FILE  the configuration: one JSON object
  --check        check the configuration and exit: 0 good, 2 wrong
  --version      print the version and exit
  --help         this text

Fields of the configuration, [what an absent one means]:
  name           the host's name at the shelf
  initiator      its iSCSI name [iqn.2026-11.io.ledge:host.NAME]
  shelf          {"apis": […], "token": "…"}: the addresses of both controllers' APIs, and the shelf's token
  listen         address:port of the volumes' portal [127.0.0.1:3260]
  portal         the address that initiators are told [listen]
  api            the unix socket of the operator, for ledge [run/hostd.sock]
  cache          {"path": "…", "size": "…"}: the flash read cache, a device or a file; its content is lost [none]
  journal_bytes, store_bytes   sizes of the host's LUNs on the shelf when they are made [256MiB, 64TiB]
  memory         {"buffer", "map", "index", "lines"}: sizes [64MiB, 1GiB, by the cache's size, 64MiB]
  chap           who may use the volumes [everybody who reaches the portal]. An initiator logs in by the entry with its
                 name, or where none has it, by one without; to the volumes of the entry, or all. mutual_user and its
                 secret are what the agent proves when asked. A secret has 12 to 128 bytes, here or in a file;
                 neither may be open to everybody. It is read at start.
  snapshots      taken by themselves: [{"name": "hourly", "volumes": ["vmfs1"], "every": "1h", "keep": 24}, …]: of an
                 entry's volumes at one instant in every period (multiples of it since 1970, UTC), the newest so many
                 kept; they are named NAME-YYYYMMDD-HHMMSS [none]
  spin_us        look for an initiator's next command for so many microseconds before sleeping: less latency for one
                 command at a time, for up to as much of a core; 50 is a good value where a core is free [0]
  log_level      debug, info, warn or error [info]

Example:
` + example + `
  hostd --config hostd.json --check
  hostd --config hostd.json &
  ledge volume create vmfs1 2TiB

Exit codes:
  0 told to stop   1 failed: restart it   2 wrong usage or configuration   3 another host opened the store: don't restart
`
