package scsi

// opTable is the CDB table with an index. A Target holds one, because REPORT SUPPORTED OPERATION
// CODES reads the table that it stands in.
type opTable struct {
	ops     []op
	plain   [256]*op
	actions [256]map[byte]*op
}

func newOpTable() *opTable {
	x := &opTable{ops: operations()}
	for i := range x.ops {
		o := &x.ops[i]
		if o.action == noAction {
			x.plain[o.code] = o
			continue
		}
		if x.actions[o.code] == nil {
			x.actions[o.code] = make(map[byte]*op)
		}
		x.actions[o.code][byte(o.action)] = o
	}
	return x
}

// lookup finds the command of a CDB's first two bytes, or nil.
func (x *opTable) lookup(code, second byte) *op {
	if a := x.actions[code]; a != nil {
		return a[second&0x1F]
	}
	return x.plain[code]
}

func (x *opTable) known(code byte) bool      { return x.plain[code] != nil || x.actions[code] != nil }
func (x *opTable) hasActions(code byte) bool { return x.actions[code] != nil }
