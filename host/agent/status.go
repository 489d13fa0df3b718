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
	}
	a.mu.Unlock()
	for _, n := range a.sessions() {
		s.Sessions += n
	}
	if e == nil {
		return s
	}
	st := e.Stats()
	s.Store, s.Figures, s.Cache, s.Maps, s.Index, s.Volumes = st.Store, st.Figures, st.Cache, st.Maps, st.Index, len(e.Volumes())
	s.Paths = append(s.Paths, st.Paths...)
	if err := e.Err(); err != nil {
		s.Trouble = err.Error()
	}
	return s
}
