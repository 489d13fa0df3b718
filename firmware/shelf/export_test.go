package shelf

// RoundIdle is a round of the background with nobody writing.
func (p *Pool) RoundIdle(t interface{ Fatal(...any) }) bool {
	worked, err := p.destageRound(p.ctx, needDrain)
	if err != nil {
		t.Fatal(err)
	}
	return worked
}
