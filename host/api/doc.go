// Package api is what the programs of a host say to each other and to a shelf: the agent's API over
// HTTP (its JSON, its client) and a client of the shelf's.
//
// It owns the words of the agent's API and nothing of its workings. Bodies are bounded in both
// directions, and a server that answers something else gets an error that says who answered.
//
// # The agent's API
//
// On a unix socket whose file mode is the access control. JSON objects, at most 64 KiB, but for images; sizes are bytes.
//
//	GET    /v1/status                → Status
//	GET    /v1/volumes               → {volumes: [Volume…]}
//	POST   /v1/volumes               {name, size_bytes, compression?: "s2", "zstd" or "off"} → 201 Volume
//	GET    /v1/volumes/{name}        → Volume
//	DELETE /v1/volumes/{name}        → 204; 409 while sessions use it, without ?force=true
//	POST   /v1/volumes/{name}/rename {name, force?: bool} → Volume, of another IQN; 409 while sessions use it, without force
//	POST   /v1/volumes/{name}/promote → Volume: of a clone; it takes over its origin's snapshots up to its own
//	GET    /v1/volumes/{name}/diff   ?from=SNAPSHOT&to=SNAPSHOT&offset=N → Diff; without to: to the volume as it is
//	GET    /v1/volumes/{name}/export ?snapshot=NAME → the volume, or its snapshot, as a qcow2 image with all tables in front
//	POST   /v1/volumes/{name}/import ?size_bytes=N&compression=C, such an image → 201 Volume, once all of it is there
//	DELETE /v1/volumes/{name}/snapshots/{snapshot} → 204
//	POST   /v1/volumes/{name}/snapshots/{snapshot}/clone    {name} → 201 Volume
//	POST   /v1/volumes/{name}/snapshots/{snapshot}/rollback {force?: bool} → Volume; 409 while sessions use it, without force
//	GET    /v1/stats                 ?volume=NAME → Stats: of one volume, or of all
//	GET    /v1/snapshots             ?volume=NAME → {snapshots: [Snapshot…]}
//	POST   /v1/snapshots             {name, volumes: [NAME…]} → 201 {snapshots: [Snapshot…]}: all of one instant
//	POST   /v1/volumes/{name}/compression {compression} → Volume: for what is written from now on
//	POST   /v1/volumes/{name}/resize {size_bytes, shrink?: bool} → Volume; 409 to shrink without shrink
//
// Errors are {"error": "...", "hint": "..."}: 400 the request is wrong, 404 no such volume, 409 the state
// forbids it, 413 the body is too large, 503 the agent is not serving yet, 507 the pool is full.
package api
