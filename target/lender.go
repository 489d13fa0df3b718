package target

import "context"

// Lender is implemented by a Device that has some or all of its blocks in memory and can show them
// in place: a READ then goes from that memory to the socket without a copy between.
//
// A device that wraps another by embedding it inherits Lend with the rest, and what it lends is not
// what its own Read would have said: it must override both or none.
type Lender interface {
	Device
	// Lend appends to dst the memory of the n bytes (a multiple of BlockBytes) from lba on, in
	// as many pieces as it lies in, and returns the result with a loan. Until the loan is given
	// back nothing of that memory changes, whatever is written meanwhile; nobody writes to it. A
	// nil loan says that the blocks are not in memory, or an address is beyond the end: Read
	// then. Lend waits for nothing but a short lock; it may be called concurrently with
	// everything else.
	Lend(lba uint64, n int, dst [][]byte) ([][]byte, Loan)
}

// Fetcher is implemented by a Device whose reads end in memory of its own, such as the buffers of what it read from drives: a READ
// then goes from there to the socket without a copy between. What is said of wrappers at Lender is true of it, too.
type Fetcher interface {
	Device
	// Fetch is Read, but for where the data is: it appends to dst the memory of the n bytes (a
	// multiple of BlockBytes) from lba on, in as many pieces as it lies in, and returns the result
	// with a loan. Until the loan is given back nothing of that memory changes; nobody writes to
	// it. With an error there is no loan, and dst is returned as it was.
	Fetch(ctx context.Context, lba uint64, n int, dst [][]byte) ([][]byte, Loan, error)
}

// Loan is memory that a Lender or a Fetcher shows.
type Loan interface {
	// Return gives it back. It is called once, from any goroutine.
	Return()
}
