package agent

import "github.com/ledge-storage/ledge/host/api"

// status is what 'ledge host status' shows.
func (a *Agent) status() api.Status {
	a.mu.Lock()
	e := a.engine
	s := api.Status{
		Host: a.cfg.Name, Initiator: a.cfg.Initiator, Version: a.opt.Version, Phase: a.phase, Since: a.since, Portal: a.cfg.Portal,
		Volumes: len(a.targets), Paths: []api.Path{}, MaxVolumes: MaxVolumes, MaxSizeBytes: MaxVolumeBytes, SizeStepBytes: VolumeStep,
	}
	s.Schedules = append([]api.Schedule{}, a.schedules...)
	if a.failure != nil {
		s.Trouble = a.failure.Error()
		if e == nil && canBeGivenUp(a.failure) {
			s.Trouble += "; while its drives may come back, wait for them; where they will not, 'ledge host accept-lost' gives up what cannot be read, and nothing else"
		}
	}
	a.mu.Unlock()
	for _, n := range a.sessions() {
		s.Sessions += n
	}
	if e == nil {
		return s
	}
	st := e.Stats()
	s.Store, s.Figures, s.Cache, s.Maps, s.Index, s.Work, s.GivenUp, s.Volumes = st.Store, st.Figures, st.Cache, st.Maps, st.Index, st.Work, st.GivenUp, len(e.Volumes())
	s.Paths = append(s.Paths, st.Paths...)
	if err := e.Err(); err != nil {
		s.Trouble = err.Error()
	}
	return s
}
