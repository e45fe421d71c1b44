{{/* Pod template of a component: root, component, spec. */}}
{{- define "chiasm.podTemplate" -}}
{{- $root := .root -}}
{{- $values := .spec.values -}}
{{- $downloads := and .spec.model (ne $root.Values.model.download.source "none") -}}
metadata:
  labels:
    {{- include "chiasm.labels" . | nindent 4 }}
    {{- with .spec.role }}
    llm-d.ai/role: {{ . }}
    {{- end }}
    {{- with $values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    kubectl.kubernetes.io/default-container: {{ .component }}
    {{- with $values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "chiasm.serviceAccount" . }}
  automountServiceAccountToken: {{ eq .component "orchestrator" }}
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ add (default 10 $values.drainSeconds) (ternary 15 10 (eq .spec.kind "Deployment")) }}
  securityContext: {{- toYaml $root.Values.podSecurityContext | nindent 4 }}
  {{- with $root.Values.global.imagePullSecrets }}
  imagePullSecrets: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $values.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with $values.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.affinity }}
  affinity: {{- toYaml . | nindent 4 }}
  {{- end }}
  topologySpreadConstraints:
    {{- if $values.topologySpreadConstraints }}
    {{- toYaml $values.topologySpreadConstraints | nindent 4 }}
    {{- else }}
    - maxSkew: 1
      topologyKey: kubernetes.io/hostname
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels: {{- include "chiasm.selectorLabels" . | nindent 10 }}
    {{- end }}
  {{- if $downloads }}
  initContainers:
    {{- include "chiasm.download" . | nindent 4 }}
  {{- end }}
  containers:
    - name: {{ .component }}
      image: {{ include "chiasm.image" (dict "root" $root "image" $values.image) }}
      imagePullPolicy: {{ include "chiasm.pullPolicy" (dict "root" $root "image" $values.image) }}
      args: [{{ .spec.program }}]
      env: {{- include "chiasm.env" . | nindent 8 }}
      ports:
        - {name: grpc, containerPort: {{ .spec.port }}}
        - {name: metrics, containerPort: 9090}
        - {name: health, containerPort: 9091}
      {{- if $root.Values.probes.enabled }}
      {{- with $root.Values.probes }}
      startupProbe:
        grpc: {port: 9091, service: chiasm.loaded}
        {{- toYaml .startup | nindent 8 }}
      readinessProbe:
        {{- /* A gateway without a decoder lets requests wait, which must reach it for that. */}}
        grpc: {port: 9091{{ if eq $.component "gateway" }}, service: chiasm.loaded{{ end }}}
        {{- toYaml .readiness | nindent 8 }}
      livenessProbe:
        grpc: {port: 9091, service: chiasm.live}
        {{- toYaml .liveness | nindent 8 }}
      {{- end }}
      {{- end }}
      {{- if eq .spec.kind "Deployment" }}
      lifecycle:
        # Callers that come through a Service learn a little late that the pod goes.
        preStop: {exec: {command: [sleep, "5"]}}
      {{- end }}
      {{- with $values.resources }}
      resources: {{- toYaml . | nindent 8 }}
      {{- end }}
      securityContext: {{- toYaml $root.Values.containerSecurityContext | nindent 8 }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        {{- if .spec.model }}
        - {name: models, mountPath: /models, readOnly: true}
        {{- end }}
        {{- include "chiasm.secretMounts" . | nindent 8 }}
        {{- with $values.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - {name: tmp, emptyDir: {sizeLimit: {{ $root.Values.tmpSizeLimit }}}}
    {{- if .spec.model }}
    {{- include "chiasm.modelVolume" $root | nindent 4 }}
    {{- end }}
    {{- if $downloads }}
    - {name: fetch, configMap: {name: {{ include "chiasm.fullname" $root }}-fetch}}
    {{- end }}
    {{- include "chiasm.secretVolumes" . | nindent 4 }}
    {{- with $values.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}

{{- define "chiasm.secretMounts" -}}
{{- if .root.Values.tls.enabled }}
- {name: tls, mountPath: /etc/chiasm/tls, readOnly: true}
{{- end }}
{{- if eq .component "gateway" }}
{{- if include "chiasm.gatewayTlsSecret" .root }}
- {name: public-tls, mountPath: /etc/chiasm/public-tls, readOnly: true}
{{- end }}
{{- if .root.Values.tls.gateway.clientCASecret }}
- {name: client-ca, mountPath: /etc/chiasm/client-ca, readOnly: true}
{{- end }}
{{- if .root.Values.auth.enabled }}
- {name: auth, mountPath: /etc/chiasm/auth, readOnly: true}
{{- end }}
{{- end }}
{{- end -}}

{{- define "chiasm.secretVolumes" -}}
{{- if .root.Values.tls.enabled }}
- {name: tls, secret: {secretName: {{ include "chiasm.tlsSecret" .root }}, defaultMode: 0440}}
{{- end }}
{{- if eq .component "gateway" }}
{{- with include "chiasm.gatewayTlsSecret" .root }}
- {name: public-tls, secret: {secretName: {{ . }}, defaultMode: 0440}}
{{- end }}
{{- with .root.Values.tls.gateway.clientCASecret }}
- {name: client-ca, secret: {secretName: {{ . }}, defaultMode: 0440}}
{{- end }}
{{- if .root.Values.auth.enabled }}
- {name: auth, secret: {secretName: {{ include "chiasm.authSecret" .root }}, defaultMode: 0440}}
{{- end }}
{{- end }}
{{- end -}}
